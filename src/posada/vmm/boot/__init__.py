"""Putting a kernel into guest memory, and the first vcpu where it starts. Read `posada.vmm.boot.load` first."""
