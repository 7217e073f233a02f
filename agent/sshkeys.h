/* SSH host keys of a fork. */
#ifndef POSADA_SSHKEYS_H
#define POSADA_SSHKEYS_H

/*
 * Removes the host keys, where there are some, and makes an ed25519 key before it calls done (error 0, or a positive errno).
 * An RSA key takes seconds on an emulated CPU: the other kinds are left to sshkeys_rest.
 */
void sshkeys_renew(void (*done)(int error, const char *note));
/* Makes what sshkeys_renew left out, in the background. */
void sshkeys_rest(void);

#endif
