/* Folders of the host (virtio-fs): mounted where the command line says. */
#ifndef POSADA_FOLDERS_H
#define POSADA_FOLDERS_H

/* posada.folder0=TARGET[:ro], posada.folder1=…: NULL, or why one could not be mounted (in a static buffer). */
const char *folders_mount(void);

#endif
