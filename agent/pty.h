/* Pseudo terminals. */
#ifndef POSADA_PTY_H
#define POSADA_PTY_H

#include "cbor.h"

/* Returns the non-blocking master, or -errno; *slave is opened too. args: rows, cols. */
int pty_open(const struct cbor *args, int *slave);
void pty_resize(int master, const struct cbor *args);
/* What a person does to end the input: types the terminal's end-of-file character. */
void pty_end_of_file(int master);

#endif
