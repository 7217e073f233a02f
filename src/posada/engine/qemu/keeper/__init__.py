"""The keeper: parent of one QEMU, standard library only. `posada.engine.qemu.spawn` starts it, isolated from all else.

Its imports are chosen for start-up: `json`, `socket` and `signal` cost 6 ms together, so the C modules below them do
what has to be done before QEMU runs, and `json` comes in after.
"""
