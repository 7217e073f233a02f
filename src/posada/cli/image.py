"""image build | import | ls | inspect | rm | export."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from posada.cli import output, shapes
from posada.cli.arguments import complete_image
from posada.cli.output import formatted
from posada.cli.session import hosted

if TYPE_CHECKING:
    from posada.aio import Host
    from posada.model.records import ImageRecord

image_argument = click.argument("image", metavar="IMAGE", shell_complete=complete_image)
existing = click.Path(exists=True, dir_okay=False)


@click.group()
def image() -> None:
    """What machines are made from."""


@image.command()
@click.argument("release", metavar="NAME:TAG")
@click.option("--name", metavar="NAME:TAG", help="What it will be called (default: as what it is built from).")
@click.option("-p", "--package", "packages", multiple=True, metavar="PACKAGE", help="Install it too. Repeatable.")
@click.option("--size", metavar="SIZE", help="Of the root file system (default: what it needs and some room).")
@click.option("--arch", type=click.Choice(["x86_64", "aarch64"]), default="x86_64", show_default=True)
@formatted
@hosted
async def build(
    host: Host, release: str, name: str | None, packages: tuple[str, ...], size: str | None, arch: str
) -> None:
    """Build an image from a distribution's packages, such as debian:12."""
    from posada.cli.progress import Bar

    with Bar(f"building {name or release}") as bar:
        made = await host.images.build(release, packages=packages, size=size, arch=arch, name=name, progress=bar)
    output.emit(shapes.image(made.record), lambda: f"{made.name} {made.digest[:12]}")


@image.command(name="import")
@click.argument("disk", metavar="[DISK]", required=False, type=existing)
@click.option("--kernel", type=existing, metavar="FILE", help="Boot this kernel.")
@click.option("--initrd", type=existing, metavar="FILE", help="With this initial RAM disk.")
@click.option("--append", default="", metavar="ARGS", help="And these kernel arguments.")
@click.option("--name", required=True, metavar="NAME:TAG", help="What it will be called.")
@formatted
@hosted
async def import_(host: Host, disk: str | None, kernel: str | None, initrd: str | None, append: str, name: str) -> None:
    """Make an image from a qcow2 or raw disk, a kernel with its initrd, or all three."""
    from posada.cli.progress import Bar

    if disk is None and kernel is None:
        raise click.UsageError("name a DISK, a --kernel, or both")
    with Bar(f"importing {name}") as bar:
        made = await host.images.import_disk(disk, name=name, kernel=kernel, initrd=initrd, append=append, progress=bar)
    output.emit(shapes.image(made.record), lambda: f"{made.name} {made.digest[:12]}")


@image.command()
@formatted
@hosted
async def ls(host: Host) -> None:
    """List the images of this host."""
    from posada.model.units import format_size

    records = [found.record for found in await host.images.list()]

    def row(record: ImageRecord) -> tuple[str, ...]:
        return (
            ", ".join(record.names) or "-",
            record.digest[:12],
            record.arch,
            format_size(record.size),
            "yes" if record.agent else "no",
            output.age(record.created),
        )

    header = ("NAME", "DIGEST", "ARCH", "SIZE", "AGENT", "AGE")
    output.emit([shapes.image(record) for record in records], lambda: output.columns(header, map(row, records)))


@image.command()
@image_argument
@formatted
@hosted
async def inspect(host: Host, image: str) -> None:
    """Show all there is to know of an image."""
    import msgspec

    from posada.model.units import format_size

    record = (await host.images.get(image)).record
    data = {**msgspec.to_builtins(record), **shapes.image(record)}
    pairs = [
        ("names", ", ".join(record.names)),
        ("digest", record.digest),
        ("arch", record.arch),
        ("source", record.source),
        ("created", output.when(record.created)),
        ("size", format_size(record.size)),
        ("disk", f"{record.disk_format}, {format_size(record.disk_size)}" if record.disk else ""),
        ("kernel", record.kernel or ""),
        ("initrd", record.initrd or ""),
        ("append", record.append),
        ("agent", "yes" if record.agent else "no"),
        ("path", str(host.home / record.path)),
    ]
    output.emit(data, lambda: output.fields(pairs))


@image.command()
@click.argument("images", metavar="IMAGE...", nargs=-1, required=True, shell_complete=complete_image)
@formatted
@hosted
async def rm(host: Host, images: tuple[str, ...]) -> int:
    """Remove images. One that machines stand on is refused, and they are named."""
    from posada.errors import PosadaError

    status, done = 0, []
    for name in images:
        try:
            await (await host.images.get(name)).remove()
        except PosadaError as error:
            status = status or output.fail_with(error)
        else:
            done.append(name)
    output.emit(done, lambda: "\n".join(done))
    return status


@image.command()
@image_argument
@click.argument("target", metavar="FILE", type=click.Path(dir_okay=False))
@click.option("--type", "kind", type=click.Choice(["qcow2", "raw"]), default="qcow2", show_default=True)
@formatted
@hosted
async def export(host: Host, image: str, target: str, kind: str) -> None:
    """Write an image's disk to a file that stands alone."""
    from posada.cli.progress import Bar

    with Bar(f"exporting {image}"):
        path = await (await host.images.get(image)).export(target, format=kind)
    output.emit({"path": str(path), "format": kind}, lambda: str(path))
