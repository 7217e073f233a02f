"""What the processes beside a machine share: the qemu engine's keeper and the kvm engine's monitor.

Standard library only, and little of it: a keeper is up in 15 ms because nothing here imports more than it must (no
typing, no dataclasses, no json before the end). Nothing here opens a file of a machine by path, unless it says so.
"""
