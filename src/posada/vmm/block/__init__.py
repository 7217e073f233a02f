"""Disks of the monitor: raw files and qcow2 images, on descriptors that somebody else opened.

Read `disk.py` (what a disk promises), then `raw.py`, then `qcow2/disk.py`.
"""
