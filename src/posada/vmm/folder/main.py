"""``python -I -S main.py FOLDER SOCKET ro|rw``: serve the directory of one descriptor over the other, until it hangs up."""

from __future__ import annotations

import os
import resource
import socket
import sys


def main() -> int:
    if len(sys.argv) != 4 or sys.argv[3] not in ("ro", "rw"):
        sys.stderr.write("usage: main.py FOLDER SOCKET ro|rw\n")
        return 2
    sys.path.insert(0, os.path.abspath(os.path.join(os.path.dirname(__file__), "..", "..", "..")))
    from posada.vmm.folder import tree
    from posada.vmm.folder.server import MAX_HANDLES, Server

    wanted = tree.MAX_NODES + MAX_HANDLES + 100
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = wanted if hard == resource.RLIM_INFINITY else min(hard, wanted)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    tree.MAX_NODES = min(tree.MAX_NODES, limit - MAX_HANDLES - 100) if limit > MAX_HANDLES + 200 else limit // 2
    os.umask(0)  # the guest's own has been applied
    if os.geteuid() == 0:
        os.fchdir(int(sys.argv[1]))
        os.chroot(".")
    Server(int(sys.argv[1]), socket.socket(fileno=int(sys.argv[2])), readonly=sys.argv[3] == "ro").run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
