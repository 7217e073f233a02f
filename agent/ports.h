/* virtio-serial ports named org.posada.agent.N. */
#ifndef POSADA_PORTS_H
#define POSADA_PORTS_H

/* Opens those that are there; each becomes a link. Returns how many. */
int ports_open(void);

#endif
