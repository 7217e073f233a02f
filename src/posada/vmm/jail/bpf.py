"""Seccomp filters: classic BPF, assembled from rules (seccomp(2), linux/filter.h, linux/seccomp.h)."""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

ALLOW = 0x7FFF_0000
KILL = 0x8000_0000
"""The whole process."""

_LOAD, _AND, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x54, 0x15, 0x35, 0x06
_NUMBER, _ARCH, _ARGUMENTS = 0, 4, 16
_AUDIT_ARCH_X86_64 = 0xC000_003E
#: Numbers with this bit are the x32 ABI's, whose calls no rule here speaks of.
_X32 = 0x4000_0000

_PR_SET_SECCOMP, _MODE_FILTER = 22, 2
_prctl = ctypes.CDLL(None, use_errno=True).prctl


def errno(number: int) -> int:
    """The action that makes a call fail."""
    return 0x0005_0000 | number


@dataclass(frozen=True)
class Argument:
    """The lower 32 bits of an argument (0–5), and'ed with ``mask``, are ``value``."""

    argument: int
    value: int
    mask: int = 0xFFFF_FFFF


@dataclass(frozen=True)
class Rule:
    """``action`` for a system call whose arguments pass all tests. The first rule that fits decides."""

    number: int
    action: int = ALLOW
    tests: tuple[Argument, ...] = ()


def assemble(rules: Iterable[Rule], otherwise: int) -> bytes:
    """The program. Rules with tests that are often used belong first: the kernel remembers the others' outcome."""
    code = [_ins(_LOAD, _ARCH), _ins(_EQUAL, _AUDIT_ARCH_X86_64, 1, 0), _ins(_RETURN, KILL)]
    code += [_ins(_LOAD, _NUMBER), _ins(_AT_LEAST, _X32, 0, 1), _ins(_RETURN, KILL)]
    for rule in rules:
        body = _tests(rule.tests)
        code += [_ins(_EQUAL, rule.number, 0, len(body) + 1 + bool(body)), *body, _ins(_RETURN, rule.action)]
        if body:
            code.append(_ins(_LOAD, _NUMBER))  # a failed test has another value in hand, and comes here
    code.append(_ins(_RETURN, otherwise))
    return b"".join(code)


def _tests(tests: Sequence[Argument]) -> list[bytes]:
    """Falls through when all pass; else jumps over the return that follows."""
    code: list[bytes] = []
    left = sum(2 if test.mask == 0xFFFF_FFFF else 3 for test in tests)
    for test in tests:
        code.append(_ins(_LOAD, _ARGUMENTS + 8 * test.argument))
        if test.mask != 0xFFFF_FFFF:
            code.append(_ins(_AND, test.mask))
        code.append(_ins(_EQUAL, test.value, 0, left - len(code)))
    return code


def _ins(code: int, value: int, true: int = 0, false: int = 0) -> bytes:
    return struct.pack("<HBBI", code, true, false, value)


def install(program: bytes) -> None:
    """For the calling thread, and all that it starts. Only `no_new_privileges` must come before. Raises OSError."""
    buffer = ctypes.create_string_buffer(program, len(program))
    # SAFETY: struct sock_fprog {u16 len; struct sock_filter *filter}; the kernel copies `buffer`, alive until it returns.
    fprog = struct.pack("<HxxxxxxQ", len(program) // 8, ctypes.addressof(buffer))
    if _prctl(_PR_SET_SECCOMP, _MODE_FILTER, fprog, 0, 0):
        raise OSError(ctypes.get_errno(), f"prctl(PR_SET_SECCOMP): {os.strerror(ctypes.get_errno())}")
