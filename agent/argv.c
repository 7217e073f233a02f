#include "argv.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "util.h"

#define DEFAULT_PATH "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
#define DEFAULTS 8 /* variables the agent adds, at most */

/* Strings are copied one after the other into one block that is known to be large enough (see capacity). */
struct block {
	char *at, *end;
};

static char *put(struct block *b, const struct cbor *value)
{
	int n = cbor_string(value, b->at, (size_t)(b->end - b->at));
	if (n < 0)
		return NULL;
	char *text = b->at;
	b->at += n + 1;
	return text;
}

static char *put_format(struct block *b, const char *format, ...) __attribute__((format(printf, 2, 3)));

static char *put_format(struct block *b, const char *format, ...)
{
	va_list args;
	va_start(args, format);
	int n = vsnprintf(b->at, (size_t)(b->end - b->at), format, args);
	va_end(args);
	char *text = b->at;
	b->at += n < b->end - b->at ? n + 1 : b->end - b->at;
	return text;
}

static bool put_array(struct block *b, const struct cbor *list, char **out)
{
	const uint8_t *at = list->data, *end = list->data + list->size;
	struct cbor item;
	for (uint64_t i = 0; i < list->number; i++)
		if (!cbor_read(&at, end, &item) || !(out[i] = put(b, &item)))
			return false;
	return true;
}

/* "KEY=value" of every pair; a key must not be empty or hold '='. Returns the count or -1. */
static int put_env(struct block *b, const struct cbor *map, char **out)
{
	const uint8_t *at = map->data, *end = map->data + map->size;
	struct cbor key, value;
	for (uint64_t i = 0; i < map->number; i++) {
		if (!cbor_read(&at, end, &key) || !cbor_read(&at, end, &value))
			return -1;
		char *text = put(b, &key);
		if (!text || !*text || strchr(text, '='))
			return -1;
		b->at[-1] = '=';
		if (!put(b, &value))
			return -1;
		out[i] = text;
	}
	return (int)map->number;
}

static bool has(char **env, int n, const char *name)
{
	size_t length = strlen(name);
	for (int i = 0; i < n; i++)
		if (strncmp(env[i], name, length) == 0 && env[i][length] == '=')
			return true;
	return false;
}

static int add_defaults(struct block *b, char **env, int n, const struct user *u, const char *term)
{
	int given = n;
	if (!has(env, given, "PATH"))
		env[n++] = put_format(b, "PATH=" DEFAULT_PATH);
	if (!has(env, given, "HOME"))
		env[n++] = put_format(b, "HOME=%s", u->home);
	if (!has(env, given, "USER"))
		env[n++] = put_format(b, "USER=%s", u->name);
	if (!has(env, given, "LOGNAME"))
		env[n++] = put_format(b, "LOGNAME=%s", u->name);
	if (!has(env, given, "SHELL"))
		env[n++] = put_format(b, "SHELL=%s", u->shell);
	if (*term && !has(env, given, "TERM"))
		env[n++] = put_format(b, "TERM=%s", term);
	return n;
}

static int refuse(struct argv *a, const char **problem, const char *why, int error)
{
	argv_free(a);
	*problem = why;
	return -error;
}

int argv_read(struct argv *a, const struct cbor *args, struct user *user, bool terminal, const char **problem)
{
	struct cbor argv = cbor_get(args, "argv"), env = cbor_get(args, "env"), cwd = cbor_get(args, "cwd");
	struct cbor pty = cbor_get(args, "pty");
	char who[64], term[64] = "";
	*a = (struct argv){0};
	if (argv.type != CBOR_ARRAY || argv.number == 0)
		return refuse(a, problem, "argv must be a list of at least one text", EINVAL);
	if (env.type != CBOR_NONE && env.type != CBOR_MAP)
		return refuse(a, problem, "env must be a map", EINVAL);
	int n = cbor_get_string(args, "user", who, sizeof who);
	if (n == -2 || user_find(n < 0 ? NULL : who, user) < 0)
		return refuse(a, problem, "no such user or group", ENOENT);
	if (terminal && cbor_get_string(&pty, "term", term, sizeof term) < 0)
		strcpy(term, "xterm");
	/* Each string takes its bytes and a NUL; a CBOR item has a byte of head at least, so the sizes cover the NULs. */
	size_t capacity = argv.size + env.size + cwd.size + 1 + sizeof(struct user) + sizeof term + 256;
	a->text = xcalloc(1, capacity);
	a->argv = xcalloc((size_t)argv.number + 1, sizeof *a->argv);
	a->envp = xcalloc((size_t)env.number + DEFAULTS + 1, sizeof *a->envp);
	struct block b = {a->text, a->text + capacity};
	if (!put_array(&b, &argv, a->argv))
		return refuse(a, problem, "argv must hold texts without NUL", EINVAL);
	int vars = env.type == CBOR_MAP ? put_env(&b, &env, a->envp) : 0;
	if (vars < 0)
		return refuse(a, problem, "env must map names to texts without NUL", EINVAL);
	if (cwd.type != CBOR_NONE && cwd.type != CBOR_NULL && !(a->cwd = put(&b, &cwd)))
		return refuse(a, problem, "cwd must be a text without NUL", EINVAL);
	if (!cbor_get_bool(args, "clear_env", false))
		vars = add_defaults(&b, a->envp, vars, user, term);
	a->path = DEFAULT_PATH;
	for (int i = 0; i < vars; i++)
		if (strncmp(a->envp[i], "PATH=", 5) == 0)
			a->path = a->envp[i] + 5;
	return 0;
}

void argv_free(struct argv *a)
{
	free(a->text);
	free(a->argv);
	free(a->envp);
	*a = (struct argv){0};
}
