/* What the tests need: a check that says where it failed. */
#ifndef POSADA_CHECK_H
#define POSADA_CHECK_H

#include <stdio.h>
#include <stdlib.h>

#define CHECK(condition)                                                                                                   \
	do {                                                                                                               \
		if (!(condition)) {                                                                                        \
			fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition);                                    \
			exit(1);                                                                                           \
		}                                                                                                          \
	} while (0)

#endif
