"""The FUSE protocol as far as it is spoken here: version 7.31, linux/fuse.h."""

from __future__ import annotations

import os
from enum import IntEnum
from struct import Struct

MAJOR, MINOR = 7, 31
ROOT = 1
MAX_WRITE = 128 << 10
IN_HEADER = Struct("<IIQQIIII")
OUT_HEADER = Struct("<IiQ")

INIT_IN = Struct("<IIII")
INIT_OUT = Struct("<IIIIHHIIHHI28x")
ATTR = Struct("<QQQQQQIIIIIIIIII")
ENTRY = Struct("<QQQQII")
ATTR_OUT = Struct("<QII")
GETATTR_IN = Struct("<IIQ")
SETATTR_IN = Struct("<IIQQQQQQIIIIIIII")
MKNOD_IN = Struct("<IIII")
MKDIR_IN = Struct("<II")
RENAME_IN = Struct("<Q")
RENAME2_IN = Struct("<QII")
LINK_IN = Struct("<Q")
OPEN_IN = Struct("<II")
OPEN_OUT = Struct("<QII")
CREATE_IN = Struct("<IIII")
READ_IN = Struct("<QQIIQII")
WRITE_IN = Struct("<QQIIQII")
WRITE_OUT = Struct("<II")
RELEASE_IN = Struct("<QIIQ")
FSYNC_IN = Struct("<QII")
FALLOCATE_IN = Struct("<QQQII")
LSEEK_IN = Struct("<QQII")
LSEEK_OUT = Struct("<Q")
FORGET_IN = Struct("<Q")
BATCH_FORGET_IN = Struct("<II")
FORGET_ONE = Struct("<QQ")
STATFS_OUT = Struct("<QQQQQIIII24x")
DIRENT = Struct("<QQII")

# Flags of INIT.
ASYNC_READ, BIG_WRITES, DO_READDIRPLUS, PARALLEL_DIROPS, MAX_PAGES = 1, 1 << 5, 1 << 13, 1 << 18, 1 << 22
# Which fields of SETATTR count.
SET_MODE, SET_UID, SET_GID, SET_SIZE, SET_ATIME, SET_MTIME, SET_HANDLE = 1, 2, 4, 8, 16, 32, 64
SET_ATIME_NOW, SET_MTIME_NOW = 128, 256


class Op(IntEnum):
    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    SETATTR = 4
    READLINK = 5
    SYMLINK = 6
    MKNOD = 8
    MKDIR = 9
    UNLINK = 10
    RMDIR = 11
    RENAME = 12
    LINK = 13
    OPEN = 14
    READ = 15
    WRITE = 16
    STATFS = 17
    RELEASE = 18
    FSYNC = 20
    FLUSH = 25
    INIT = 26
    OPENDIR = 27
    READDIR = 28
    RELEASEDIR = 29
    FSYNCDIR = 30
    CREATE = 35
    INTERRUPT = 36
    DESTROY = 38
    BATCH_FORGET = 42
    FALLOCATE = 43
    RENAME2 = 45
    LSEEK = 46


CHANGES = frozenset({
    Op.SETATTR, Op.SYMLINK, Op.MKNOD, Op.MKDIR, Op.UNLINK, Op.RMDIR, Op.RENAME, Op.RENAME2, Op.LINK, Op.WRITE, Op.CREATE,
    Op.FALLOCATE,
})  # fmt: skip
"""What a read-only folder refuses (and OPEN for writing)."""


def attributes(found: os.stat_result) -> bytes:
    """struct fuse_attr."""
    times = [divmod(ns, 1_000_000_000) for ns in (found.st_atime_ns, found.st_mtime_ns, found.st_ctime_ns)]
    return ATTR.pack(
        found.st_ino, found.st_size, found.st_blocks, *(seconds & (1 << 64) - 1 for seconds, _ in times),
        *(ns for _, ns in times), found.st_mode, found.st_nlink & 0xFFFF_FFFF, found.st_uid, found.st_gid,
        found.st_rdev & 0xFFFF_FFFF, found.st_blksize, 0,
    )  # fmt: skip
