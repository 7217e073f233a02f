"""The monitor: one process per vm, standard library only, on ``/dev/kvm``. Read `posada.vmm.builder` first.

Threads: the main one runs `posada.vmm.loop` and every device; each vcpu has its own, which handles its exits inline
while it holds `Loop.lock`. Nothing is opened by path after start: the engine passes descriptors.
"""
