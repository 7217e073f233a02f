"""Coverage-guided fuzzing of what reads a guest's bytes: ``python tests/fuzz/atheris_proto.py [libFuzzer options]``.

Needs ``pip install atheris``, which is not among the development dependencies: ``make test`` runs the same targets with
hypothesis. The first byte chooses the target, the second the size of the pieces.
"""

from __future__ import annotations

import sys

import atheris

with atheris.instrument_imports(include=["posada"]):
    import fuzz_targets


def one_input(data: bytes) -> None:
    if len(data) < 2:
        return
    piece, rest = data[1] + 1, data[2:]
    match data[0] % 4:
        case 0:
            fuzz_targets.client_bytes(rest, piece)
        case 1:
            fuzz_targets.agent_bytes(rest, piece)
        case 2:
            fuzz_targets.cbor_bytes(rest)
        case 3:
            fuzz_targets.unpack_bytes(rest, piece)


if __name__ == "__main__":
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()
