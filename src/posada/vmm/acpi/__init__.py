"""ACPI tables, built in Python: hardware-reduced, virtio-mmio nodes, one generic event device. Start at `tables`."""
