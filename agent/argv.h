/* The body of OPEN exec as C: argv, envp, the search path, the user. */
#ifndef POSADA_ARGV_H
#define POSADA_ARGV_H

#include "cbor.h"
#include "user.h"

struct argv {
	char **argv, **envp;
	const char *path; /* into envp or a constant */
	const char *cwd;  /* into `text`, or NULL */
	char *text;       /* all the strings, one after the other */
};

/* Returns 0, or -errno and what was wrong. */
int argv_read(struct argv *a, const struct cbor *args, struct user *user, bool terminal, const char **problem);
void argv_free(struct argv *a);

#endif
