/* Being PID 1: from the kernel's first instruction in user space to `ready`. */
#ifndef POSADA_INIT_H
#define POSADA_INIT_H

/* Boots the guest. Returns in the process that is to serve; in full mode that is a child, and PID 1 becomes the image's init. */
/* The initramfs after the root was moved over it, or -1. */
extern int initramfs_fd;

void init_run(void);

#endif
