/* Kernel modules of the initramfs. */
#ifndef POSADA_MODULES_H
#define POSADA_MODULES_H

/* Loads every module named in dir/list, in that order; the paths are relative to dir. What is missing is skipped. */
void modules_load(int dir, const char *list);

#endif
