"""The server's process: ``FOLDER SOCKET ro|rw``. It serves the directory of one descriptor over the other, until that
hangs up.

The process that was started ends once its child is in the jail and serves, with status 0, or 1 and the reason on stderr.
"""

from __future__ import annotations

import os
import resource
import socket
import sys

if __name__ == "__main__":  # -I: not even our own package is on the path
    sys.path.insert(0, os.path.abspath(os.path.join(os.path.dirname(__file__), "..", "..", "..")))

from posada.runtime import confine
from posada.vmm.folder import jail, tree
from posada.vmm.folder.server import MAX_HANDLES, Server

MAX_DATA = 512 << 20
"""Bytes of memory: the bounds of what a guest can make it keep are far below."""
_OTHERS = 100


def main() -> int:
    if len(sys.argv) != 4 or sys.argv[3] not in ("ro", "rw"):
        sys.stderr.write("usage: main.py FOLDER SOCKET ro|rw\n")
        return 2
    reader, writer = os.pipe()
    if os.fork():
        os.close(writer)
        said = os.read(reader, 4096)
        sys.stderr.write("" if said == b"ok" else said.decode(errors="replace") or "it died")
        return 0 if said == b"ok" else 1
    os.close(reader)
    try:
        server = prepare(int(sys.argv[1]), socket.socket(fileno=int(sys.argv[2])), readonly=sys.argv[3] == "ro")
    except (OSError, ValueError) as error:
        os.write(writer, str(error).encode(errors="replace")[:4096] or b"it failed")
        return 1
    os.write(writer, b"ok")
    os.close(writer)
    server.run()
    return 0


def prepare(folder: int, sock: socket.socket, *, readonly: bool) -> Server:
    """Nobody's child, in the jail. Raises OSError."""
    os.setsid()
    null = os.open(os.devnull, os.O_RDWR)
    for standard in range(3):
        os.dup2(null, standard)
    os.close(null)
    os.umask(0)  # the guest's own has been applied
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    wanted = tree.MAX_NODES + MAX_HANDLES + _OTHERS
    limit = wanted if hard == resource.RLIM_INFINITY else min(hard, wanted)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_DATA, (MAX_DATA, MAX_DATA))
    room = limit - MAX_HANDLES - _OTHERS
    tree.MAX_NODES = room if room >= MAX_HANDLES else limit // 2
    confine.expendable()
    jail.enter(folder, readonly=readonly)
    return Server(folder, sock, readonly=readonly)


if __name__ == "__main__":
    sys.exit(main())
