"""Names become files here, and nowhere else.

Every file the guest knows is a *node*: a number, and an O_PATH descriptor, reached from the root by one component at a
time with O_NOFOLLOW. A component never contains a slash and is neither ``.`` nor ``..``; symbolic links are read, never
followed. So nothing outside the folder can be named, whatever the guest does and whatever it makes. To open a file for
data it is looked up again under the name it was last seen by, and must be the same file: else ESTALE, and the guest's
kernel looks it up anew.
"""

from __future__ import annotations

import os
import stat
from errno import EINVAL, ELOOP, ENAMETOOLONG, ENFILE, ESTALE

from posada.vmm.folder.abi import ROOT

MAX_NODES = 100_000
"""Files the guest may know at a time: each costs a descriptor. It is told ENFILE, and forgets some."""

_PATH = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC


class Node:
    __slots__ = ("device", "fd", "inode", "known", "name", "parent")

    def __init__(self, fd: int, found: os.stat_result, parent: int, name: bytes) -> None:
        self.fd = fd
        self.device, self.inode = found.st_dev, found.st_ino
        self.parent, self.name = parent, name
        self.known = 0
        """How often the guest has been told of it, less what it has forgotten."""


def component(name: bytes) -> bytes:
    """A name within a directory. Raises OSError for what is none."""
    if len(name) > 255:
        raise OSError(ENAMETOOLONG, "name")
    if not name or b"/" in name or b"\0" in name or name in (b".", b".."):
        raise OSError(EINVAL, "name")
    return name


class Tree:
    """``fd``: the folder, any descriptor of a directory; the tree owns it."""

    def __init__(self, fd: int) -> None:
        root = Node(fd, os.fstat(fd), ROOT, b"")
        root.known = 1
        self._nodes = {ROOT: root}
        self._numbers = {(root.device, root.inode): ROOT}
        self._next = ROOT + 1

    def __len__(self) -> int:
        return len(self._nodes)

    def node(self, number: int) -> Node:
        """Raises OSError (ESTALE) for a number that the guest does not have from us."""
        try:
            return self._nodes[number]
        except KeyError:
            raise OSError(ESTALE, "node") from None

    def look_up(self, parent: int, name: bytes) -> tuple[int, os.stat_result]:
        """The node of a name, made known to the guest once more. Raises OSError."""
        folder = self.node(parent)
        fd = os.open(component(name), _PATH, dir_fd=folder.fd)
        try:
            found = os.fstat(fd)
            number = self._numbers.get((found.st_dev, found.st_ino))
            if number is None:
                if len(self._nodes) >= MAX_NODES:
                    raise OSError(ENFILE, "nodes")
                number = self._next
                self._next += 1
                self._nodes[number] = Node(fd, found, parent, name)
                self._numbers[found.st_dev, found.st_ino] = number
                fd = -1
            node = self._nodes[number]
            node.parent, node.name = parent, name
            node.known += 1
            return number, found
        finally:
            if fd >= 0:
                os.close(fd)

    def forget(self, number: int, times: int) -> None:
        """The guest no longer knows it as often. What it never knew is ignored."""
        node = self._nodes.get(number)
        if node is None or number == ROOT:
            return
        node.known -= times
        if node.known <= 0:
            del self._nodes[number]
            del self._numbers[node.device, node.inode]
            os.close(node.fd)

    def place(self, number: int) -> tuple[int, bytes]:
        """The directory descriptor and name a node was last seen by. Raises OSError: it is another file by now."""
        node = self.node(number)
        parent = self.node(node.parent)
        found = os.stat(node.name, dir_fd=parent.fd, follow_symlinks=False)
        if (found.st_dev, found.st_ino) != (node.device, node.inode):
            raise OSError(ESTALE, "node")
        return parent.fd, node.name

    def open(self, number: int, flags: int) -> int:
        """A descriptor for data of a regular file or directory. Raises OSError."""
        node = self.node(number)
        mode = os.fstat(node.fd).st_mode
        if stat.S_ISLNK(mode):
            raise OSError(ELOOP, "symbolic link")
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            raise OSError(EINVAL, "special file")  # the guest's kernel opens those itself
        if number == ROOT:
            return os.open(b".", flags | os.O_CLOEXEC, dir_fd=node.fd)
        parent = self.node(node.parent)
        fd = os.open(node.name, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=parent.fd)
        found = os.fstat(fd)
        if (found.st_dev, found.st_ino) != (node.device, node.inode):
            os.close(fd)
            raise OSError(ESTALE, "node")
        return fd
