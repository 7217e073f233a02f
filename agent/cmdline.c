#include "cmdline.h"

#include <string.h>

#include "util.h"

static char text[4096];
static char *words[128];
static size_t count;

void cmdline_read(void)
{
	if (read_line("/proc/cmdline", text, sizeof text) < 0)
		return;
	for (char *rest = text, *word; count < COUNT(words) && (word = strsep(&rest, " \t\n"));)
		if (*word)
			words[count++] = word;
}

const char *cmdline_get(const char *key, const char *otherwise)
{
	size_t n = strlen(key);
	for (size_t i = count; i--;)
		if (strncmp(words[i], key, n) == 0 && words[i][n] == '=')
			return words[i] + n + 1;
	return otherwise;
}
