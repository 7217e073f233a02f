"""Coverage-guided fuzzing of the virtio devices: ``python tests/fuzz/atheris_virtio.py DEVICE [libFuzzer options]``.

Needs ``pip install atheris``, which is not among the development dependencies: ``make test`` runs the same programs with
hypothesis. DEVICE is a name in `virtio_worlds.WORLDS`.
"""

from __future__ import annotations

import sys

import atheris

with atheris.instrument_imports(include=["posada"]):
    import virtio_hostile
    import virtio_worlds

if __name__ == "__main__":
    world = virtio_worlds.WORLDS[sys.argv.pop(1)]
    virtio_hostile.quiet()
    atheris.Setup(sys.argv, lambda data: virtio_hostile.run(world, data))
    atheris.Fuzz()
