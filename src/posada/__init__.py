"""posada: the open hypervisor in Python."""
