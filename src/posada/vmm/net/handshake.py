"""The third segment of TCP's handshake, which passt up to 2023 owes the guest.

Where somebody connects to a forwarded port, passt sends the guest a SYN, and takes its SYN and ACK for the connection to be
there; but it acknowledges it only with the first data of the host's side (tcp_tap_conn_from_sock and tcp_send_flag in its
tcp.c: nothing new to acknowledge, so nothing is sent). A guest that is to speak first (SMTP, MySQL, FTP) is never told that
it may. So the card answers; a second answer by a newer passt is a duplicate ACK, which TCP takes for what it is.
"""

from __future__ import annotations

from struct import Struct, unpack

SMALL = 120
"""Bytes of a frame. One with SYN and ACK and no data is never longer: 14 of Ethernet, 20 of IP, 60 of TCP."""
_IP = Struct("!BBHHHBBH4s4s")
_TCP = Struct("!2s2s4sIBBHHH")
_LENGTH = 54
_WINDOW = 512  # before scaling; as passt announces it until it knows better
_SYN_ACK, _ACK, _FLAGS = 0x12, 0x10, 0x3F


def acknowledgement(frame: bytes) -> bytes | None:
    """What a peer answers to ``frame``, if it is a SYN and ACK over IPv4 without options; else None.

    The frame is the guest's, and whatever it says is answered to the guest only.
    """
    if len(frame) < _LENGTH or frame[12:15] != b"\x08\0\x45" or frame[23] != 6 or frame[47] & _FLAGS != _SYN_ACK:
        return None
    source, target = frame[26:30], frame[30:34]
    (sequence,) = unpack("!I", frame[38:42])
    fields = (frame[36:38], frame[34:36], frame[42:46], (sequence + 1) & 0xFFFFFFFF, 0x50, _ACK, _WINDOW)
    pseudo = target + source + b"\0\x06\0\x14"
    tcp = _TCP.pack(*fields, _checksum(pseudo + _TCP.pack(*fields, 0, 0)), 0)
    ip = (0x45, 0, 40, 0, 0x4000, 64, 6)
    header = _IP.pack(*ip, _checksum(_IP.pack(*ip, 0, target, source)), target, source)
    return frame[6:12] + frame[:6] + b"\x08\0" + header + tcp


def _checksum(data: bytes) -> int:
    """RFC 1071, of an even number of bytes."""
    total: int = sum(unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF
