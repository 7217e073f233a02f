/* Mounted disks: sync, freeze, thaw, grow. */
#ifndef POSADA_DISKS_H
#define POSADA_DISKS_H

#include <stdbool.h>

/* Nothing can be written to a disk now: what would write must be refused, or the agent would hang in it. */
bool disks_frozen(void);
void disks_thaw(void);

#endif
