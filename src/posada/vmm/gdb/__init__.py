"""A GDB remote stub: look into a guest, stop it, step it (``posada debug VM``, then ``target remote`` in gdb).

The pieces, each without knowledge of the one before: `packet` turns bytes into packets, `session` packets into calls of a
`target`, and `target` does them on vcpus and guest memory. `server` ties them to a descriptor and the loop.
Source: "Debugging with GDB", appendix E, "GDB Remote Serial Protocol".

All-stop mode; a vcpu is a thread (numbered from 1). Software breakpoints lie in guest memory as ``int3`` while attached:
a machine must not be saved or forked meanwhile.
"""
