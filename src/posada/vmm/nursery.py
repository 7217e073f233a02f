"""Where monitors come from: a bare Python that has everything imported, and forks a monitor each time it is asked.

To start an interpreter and import 200 modules costs ten times what the machine itself takes to be made. So a process that
starts machines has this beside it, from its first machine on; it is nobody's child, and ends when that process does (it
closes their socket). Monitors outlive both. It opens nothing and holds nothing but the socket.

A request is one or more packets with descriptors (`MAX_FDS` each), the last of them `GO`; the first descriptor of all holds
a document: ``config``, as `MonitorConfig.to_dict`, and ``fds``, the numbers by which it means the others, in order.
"""

from __future__ import annotations

import gc
import os
import signal
import socket
import sys

MAX_FDS = 200
"""Descriptors in one packet; the kernel takes 253."""
MORE, GO = b"+", b"."


def main() -> None:
    """``sys.argv[1]``: our end of the socket. Returns when the other end is closed, or in a monitor when it has ended."""
    sock = socket.socket(fileno=int(sys.argv[1]))
    os.setsid()
    os.umask(0o077)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps
    from posada.vmm import main as monitor  # what takes time, while the other side prepares its request

    gc.collect()
    gc.freeze()  # monitors share what is alive now, and their collectors never touch it
    fds: list[int] = []
    while True:
        packet, more, _, _ = socket.recv_fds(sock, 1, MAX_FDS)
        fds += more
        if not packet:
            return
        if packet == GO:
            if os.fork() == 0:
                sock.close()
                document, *given = fds
                os._exit(monitor.born(document, given))
            for fd in fds:
                os.close(fd)
            fds = []


if __name__ == "__main__":
    main()
