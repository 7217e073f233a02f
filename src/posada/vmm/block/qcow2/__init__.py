"""qcow2 images as disks. Format: QEMU, docs/interop/qcow2.txt (here called *the format*).

| file | what it is |
| --- | --- |
| ``disk.py`` | the disk: reads and writes |
| ``image.py`` | opening and validating; what the other files share |
| ``tables.py`` | L1 and L2: where each guest cluster is |
| ``refcounts.py`` | which host clusters are taken |
| ``clusters.py`` | the order in which changes reach the file; giving clusters back |
| ``widths.py`` | refcounts of 1 to 64 bits |
| ``compressed.py`` | reading compressed clusters |
| ``clearing.py`` | discard and write-zeroes |
| ``resize.py`` | growing |
"""
