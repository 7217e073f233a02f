/*
 * Kernel modules of the initramfs: /modules/order names them in the order they load, one path a line. Behind the path may be
 * aliases (as in modules.alias), of which one must be that of a device that is there.
 */
#ifndef POSADA_MODULES_H
#define POSADA_MODULES_H

/*
 * dir: /modules, open. What is missing is skipped. A few are left out until somebody needs them, which most guests never do;
 * those, and only those, are loaded by modules_load_rare.
 */
void modules_load(int dir);
void modules_load_rare(int dir);

#endif
