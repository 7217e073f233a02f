/* HELLO: who this agent is. */
#include <string.h>
#include <sys/utsname.h>

#include "agent.h"
#include "util.h"

bool is_init;
uint64_t generation;
uint64_t fork_epoch = 1;
const char *boot_failed;

void hello_send(struct link *l)
{
	struct cbor_out o;
	struct utsname u;
	char boot_id[64] = "";
	uname(&u);
	read_line("/proc/sys/kernel/random/boot_id", boot_id, sizeof boot_id);
	link_begin(l, &o);
	cbor_put_map(&o, 10);
	cbor_pair_uint(&o, "version", PROTOCOL_VERSION);
	cbor_pair_uint(&o, "min", 1);
	cbor_pair_text(&o, "name", "posada-agent " AGENT_VERSION);
	cbor_pair_text(&o, "boot_id", boot_id);
	cbor_pair_uint(&o, "generation", generation);
	cbor_pair_bool(&o, "init", is_init);
	cbor_pair_text(&o, "kernel", u.release);
	cbor_pair_text(&o, "arch", u.machine);
	cbor_pair_text(&o, "hostname", u.nodename);
	cbor_pair_uint(&o, "window", WINDOW);
	link_send(l, &o, 0, T_HELLO);
	if (boot_failed)
		link_event(l, "boot-failed", "error", boot_failed);
}
