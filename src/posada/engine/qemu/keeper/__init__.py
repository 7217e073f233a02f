"""The keeper: parent of one QEMU, standard library only. Runs as ``python -I -S -c BOOTSTRAP``, see `posada.engine.qemu.spawn`.

Its imports are chosen for start-up: `json`, `socket` and `signal` cost 6 ms together, so the C modules below them do what
has to be done before QEMU runs, and `json` comes in after.
"""
