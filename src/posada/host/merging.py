"""Chains of disk layers do not grow without end: those of a running machine are merged when they get deep.

Each fork and each snapshot puts a layer on its source's disks. A thousand forks would leave a chain of a thousand open
files, and every read would look through all of them. So before a deep chain grows again, its upper layers are copied into
the top one, as log-structured stores do it: only layers that are not much larger than what is copied anyway. Data is
copied again only after as much has been written anew, and the depth stays logarithmic in the size.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import msgspec

from posada.errors import EngineError
from posada.host import faults
from posada.host.house import House
from posada.host.layers import collect, disk_file
from posada.host.operations import Operation
from posada.model.capabilities import Feature
from posada.model.records import Disk, VmRecord
from posada.model.states import LIVE

#: Layers a chain may have before it is merged.
DEEP = 16
#: Bytes that are copied without a thought: an overlay that was hardly written to.
SMALL = 4 << 20

log = logging.getLogger(__name__)


async def merge_deep(house: House, vm: VmRecord, op: Operation) -> VmRecord:
    """Merge what is too deep; returns the record as it is then. With the vm's lock held, before its disks grow.

    A disk that cannot be merged stays as deep as it is: whatever its machine was to do can still be done.
    """
    if vm.state not in LIVE or all(len(disk.chain) <= DEEP for disk in vm.disks):
        return vm
    if not house.engine(vm.engine).capabilities().has(Feature.MERGE_LAYERS):
        return vm
    for disk in vm.disks:
        if not disk.readonly and len(disk.chain) > DEEP:
            vm = await _merge(house, vm, disk, op)
    return vm


async def _merge(house: House, vm: VmRecord, disk: Disk, op: Operation) -> VmRecord:
    file = disk_file(house, disk)
    keep = layers_to_keep([path.stat().st_blocks * 512 for path, _ in file.chain])
    if keep > len(disk.chain) - 2:
        return vm
    # Whoever finishes or undoes the operation deletes those that nobody names any more.
    op.intend(merged=[*op.record.intent.get("merged", ()), *disk.chain[1:-1]])
    op.undo.callback(collect, house, disk.chain[1:-1])
    try:
        kept = await house.engine(vm.engine).merge(house.running(vm), file, keep)
    except EngineError as error:
        log.warning("the layers of disk %r of %r were not merged: %s", disk.name, vm.name, error)
        return vm
    faults.point("layers.merged")
    merged = msgspec.structs.replace(disk, chain=(*(disk.chain[place] for place in kept), disk.chain[-1]))
    # Durable before the files go: the record is what finds the data again.
    with house.db.transaction(durable=True):
        vm = house.save(vm, disks=tuple(merged if d.name == disk.name else d for d in vm.disks))
    faults.point("layers.merge-recorded")
    collect(house, [id for id in disk.chain if id not in merged.chain])
    return vm


def layers_to_keep(sizes: Sequence[int]) -> int:
    """How many of the lowest layers stay below the top one. ``sizes``: bytes of each file, lowest first.

    The lowest always stays: it is the image, or what the disk was made of.
    """
    keep, copied = len(sizes) - 1, sizes[-1]
    while keep > 1 and sizes[keep - 1] <= 2 * copied + SMALL:
        keep -= 1
        copied += sizes[keep]
    return keep
