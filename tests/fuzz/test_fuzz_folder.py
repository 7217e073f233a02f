"""A folder's server against a guest that says anything: it always answers, and nothing outside the folder changes.

``POSADA_FUZZ=n`` runs n programs instead of a few.
"""

from __future__ import annotations

import os
import socket
import tempfile
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from posada.vmm.folder import abi
from posada.vmm.folder.abi import Op
from posada.vmm.folder.server import Server

PROGRAMS = int(os.environ.get("POSADA_FUZZ", "60"))

ABSOLUTE = b"ABSOLUTE"
"""Stands for the path of the file beside the folder. These tests may run as root and the code may be wrong: whatever a
name reaches, were it followed, must be ours to lose.
"""
DEPTH = 8
"""Directories between the folder and those of others: no more steps up than that are likely."""
NAMES = st.sampled_from(
    [b"file", b"sub", b"link", b"up", b"new", b"new2", b"..", b".", b"", ABSOLUTE, b"../secret", b"sub/../.."]
)
NUMBERS = st.sampled_from([0, 1, 2, 3, 4, 5, 6, 0xFFFF_FFFF, (1 << 63), (1 << 64) - 1])
WORDS = st.lists(st.integers(0, 8) | NUMBERS, max_size=9).map(
    lambda words: b"".join((w & (1 << 64) - 1).to_bytes(8, "little") for w in words)
)
STRINGS = st.lists(NAMES, max_size=3).map(lambda names: b"".join(name + b"\0" for name in names))
#: What structures the operations take, so that names often stand where they should.
SIZES = {
    Op.MKNOD: 16, Op.MKDIR: 8, Op.RENAME: 8, Op.RENAME2: 16, Op.LINK: 8, Op.CREATE: 16, Op.LOOKUP: 0, Op.SYMLINK: 0,
    Op.UNLINK: 0, Op.RMDIR: 0,
}  # fmt: skip


def message(op: int, node: int, words: bytes, strings: bytes) -> bytes:
    size = SIZES.get(Op(op), len(words)) if op in set(Op) else len(words)
    body = words[:size].ljust(size, b"\0") + strings
    return abi.IN_HEADER.pack(40 + len(body), op, 1, node, 0, 0, 1, 0) + body


REQUESTS = st.builds(message, st.sampled_from(list(Op)) | st.integers(0, 60), NUMBERS, WORDS, STRINGS)


def snapshot(folder: Path) -> dict[str, object]:
    """Everything beside the shared folder."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        if "shared" not in path.parts:
            state = path.lstat()
            found[str(path)] = (state.st_mode, state.st_uid, state.st_mtime_ns, state.st_size, path.read_bytes())
    return found


@settings(max_examples=PROGRAMS, deadline=None, suppress_health_check=list(HealthCheck))
@given(requests=st.lists(REQUESTS, max_size=40), readonly=st.booleans())
def test_whatever_a_guest_asks(requests: list[bytes], readonly: bool) -> None:
    with tempfile.TemporaryDirectory() as name:
        root = Path(name, *"abcdefgh"[:DEPTH])
        root.mkdir(parents=True)
        (root / "secret").write_text("not yours")
        shared = root / "shared"
        (shared / "sub").mkdir(parents=True)
        (shared / "file").write_text("data")
        (shared / "link").symlink_to("../secret")
        (shared / "up").symlink_to("..")
        before = snapshot(root)
        ours, theirs = socket.socketpair()
        with ours:
            server = Server(os.open(shared, os.O_PATH), theirs, readonly=readonly)
            for template in requests:
                request = template.replace(ABSOLUTE, bytes(root / "secret"))
                reply = server.handle(memoryview(request))
                op = abi.IN_HEADER.unpack_from(request)[1]
                assert (reply is None) == (op in (Op.FORGET, Op.INTERRUPT, Op.BATCH_FORGET))
                if reply is not None:
                    size, error, unique = abi.OUT_HEADER.unpack_from(reply)
                    assert size == len(reply) and unique == 1 and -200 < error <= 0
            server.close()
        assert snapshot(root) == before
        if readonly:
            assert (shared / "file").read_text() == "data"
            assert sorted(os.listdir(shared)) == ["file", "link", "sub", "up"]
