"""Virtio 1.2, modern only: one queue, one transport, one file per device. To write a device, copy ``rng.py``."""
