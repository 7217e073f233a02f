"""help and spec: what the verbs and the fields of a spec are."""

from __future__ import annotations

import click

from posada.cli import output
from posada.cli.output import formatted


@click.command(name="help")
@click.argument("topic", nargs=-1)
@click.pass_context
def help_(ctx: click.Context, topic: tuple[str, ...]) -> None:
    """Show help for a verb, or the fields of a spec (posada help spec)."""
    root = ctx.find_root()
    command: click.Command = root.command
    if topic == ("spec",):
        print(describe())
        return
    context = root
    for word in topic:
        found = command.get_command(context, word) if isinstance(command, click.Group) else None
        if found is None:
            raise click.UsageError(f"there is no verb {' '.join(topic)!r}")
        context = click.Context(found, parent=context, info_name=word)
        command = found
    print(command.get_help(context))


@click.group(invoke_without_command=True)
@click.option("--schema", is_flag=True, help="Print the JSON schema.")
@click.pass_context
def spec(ctx: click.Context, schema: bool) -> None:
    """Explain the fields of a machine's spec (what create -f reads)."""
    if ctx.invoked_subcommand is None:
        print(_schema() if schema else describe())


@spec.command(name="schema")
def schema_() -> None:
    """Print the JSON schema of a spec."""
    print(_schema())


@spec.command()
@click.argument("file", type=click.Path(dir_okay=False, allow_dash=True))
@formatted
def check(file: str) -> None:
    """Check a spec file; print it in full, in canonical form."""
    import msgspec

    from posada.cli.run import _read_file
    from posada.model.machine import make_spec, spec_to_yaml

    made = make_spec(_read_file(file))
    output.emit(msgspec.to_builtins(made), lambda: spec_to_yaml(made).decode().rstrip())


def _schema() -> str:
    import json

    from posada.model.machine import json_schema

    return json.dumps(json_schema(), indent=2)


#: Field → (how it is written, what it means). tests/unit/test_cli_spec.py compares it with the model.
FIELDS: dict[str, tuple[str, str]] = {
    "version": ("1", "version of the spec's format"),
    "name": ("text", "1-63 of a-z, 0-9 and -; made up when left out"),
    "image": ("name:tag or digest", "what it is made from; built if it can be"),
    "engine": ("auto, qemu, kvm, xen", "what runs it; auto takes the best one on this host"),
    "arch": ("x86_64, aarch64", "of the guest"),
    "cpus": ("1-255", "virtual processors"),
    "memory": ("size", "such as 512MiB or 2GiB"),
    "nested": ("true, false", "the guest may run guests of its own: it is shown svm or vmx"),
    "firmware": ("direct, bios, uefi", "how it boots; direct starts the image's kernel"),
    "boot.kernel": ("path", "a kernel of this host instead of the image's"),
    "boot.initrd": ("path", "and its initial RAM disk"),
    "boot.append": ("text", "more kernel arguments"),
    "disks[].name": ("text", "the first disk is the root disk"),
    "disks[].size": ("size", "the root disk: at least the image's"),
    "disks[].source": ("path", "a qcow2 or raw file that is copied in"),
    "disks[].readonly": ("true, false", "the guest cannot write to it"),
    "folders[].source": ("path", "a directory of this host; a list of folders may also hold HOST:GUEST[:ro]"),
    "folders[].target": ("path", "where the guest has it"),
    "folders[].readonly": ("true, false", "the guest cannot change it"),
    "nics[].network": ("user", "user-mode networking: needs no privileges"),
    "nics[].mac": ("aa:bb:cc:dd:ee:ff", "made up when left out; new in each fork"),
    "ports[].guest": ("1-65535", "a list of ports may also hold 8080, 80:8080, 127.0.0.1:80:8080, 53:53/udp"),
    "ports[].host": ("1-65535", "any free one when left out"),
    "ports[].address": ("IPv4", "of this host; 127.0.0.1 when left out"),
    "ports[].protocol": ("tcp, udp", ""),
    "cloud_init.user_data": ("text", "cloud-init NoCloud documents"),
    "cloud_init.meta_data": ("text", ""),
    "cloud_init.network_config": ("text", ""),
    "cloud_init.vendor_data": ("text", ""),
    "labels": ("name: text", "yours to choose; posada ps -l finds them"),
    "limits.lifetime": ("time", "such as 90s, 10m, 2h; counted from its start"),
    "limits.idle": ("time", "counted from the last exec, copy, console or port use"),
    "limits.action": ("kill, pause", "what happens then"),
    "hostname": ("text", "of the guest; its name when left out"),
    "ephemeral": ("true, false", "deleted when it stops, and with the process that made it"),
}

EXAMPLE = """\
name: web
image: debian:12
cpus: 2
memory: 1GiB
disks: [{size: 20GiB}, {name: data, size: 100GiB}]
ports: [8080:80, 2222:22]
labels: {team: shop}
limits: {idle: 2h, action: pause}"""


def describe() -> str:
    """The fields, with an example."""
    rows = [(field, form, meaning) for field, (form, meaning) in FIELDS.items()]
    table = output.columns(("FIELD", "WRITTEN", "MEANING"), rows)
    indented = "\n".join(f"  {line}" for line in EXAMPLE.splitlines())
    return f"{table}\n\nAn example (posada create -f web.yaml):\n\n{indented}"
