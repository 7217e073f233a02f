"""A vcpu's whole state as a plain document, and back. What is loaded is untrusted: sizes and ranges are checked here,
values by the kernel, which refuses impossible ones.

Save and load only while no vcpu of the machine runs (`Vcpus.quiesce`).

Order of saving: the MP state first, because asking for it makes the kernel digest a pending INIT or SIPI, which changes
other registers; the events last, because the other calls may move an exception or interrupt.

Order of loading, each before what depends on it:

- CPUID: which bits the rest may have; TSC rate.
- special registers: ``apic_base`` turns the local APIC on; then XCRs and the extended state.
- local APIC, then the TSC, then the MSRs: the TSC-deadline timer among them needs both.
- general registers drop a pending exception: before the events, which bring it back. MP state last but one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from ctypes import Structure, sizeof
from errno import EINVAL
from typing import Any, TypeVar

from posada.errors import KvmError, StateError
from posada.kvm import cpustructs as cs
from posada.kvm.numbers import MpState
from posada.kvm.structs import CpuidEntry
from posada.kvm.vcpu import Vcpu
from posada.vmm.state import blob, integer

VERSION = 1
MSR_TSC = 0x10
HYPERV_MSRS = range(0x40000000, 0x40000200)
"""Listed by the kernel, never offered to a guest of ours."""
MAX_CPUID_ENTRIES = 256
MAX_MSR_ENTRIES = 4096
U64 = (1 << 64) - 1

Document = dict[str, Any]
AnyStructure = TypeVar("AnyStructure", bound=Structure)


def save(vcpu: Vcpu) -> Document:
    """Everything of one vcpu. Raises KvmError."""
    mp_state = vcpu.get_mp_state()
    document: Document = {
        "version": VERSION,
        "id": vcpu.id,
        "mp_state": int(mp_state),
        "regs": bytes(vcpu.get_regs()),
        "sregs": bytes(vcpu.get_sregs()),
        "xsave": bytes(vcpu.get_xsave()),
        "xcrs": bytes(vcpu.get_xcrs()),
        "debugregs": bytes(vcpu.get_debugregs()),
        "cpuid": vcpu.cpuid,
        "tsc_khz": vcpu.get_tsc_khz(),
        "msrs": _save_msrs(vcpu),
    }
    if vcpu.has_lapic:
        document["lapic"] = bytes(vcpu.get_lapic())
    if vcpu.has_tsc_offset():
        document["tsc_offset"] = vcpu.get_tsc_offset()
    document["tsc"] = vcpu.get_msrs([MSR_TSC]).get(MSR_TSC, 0)
    document["events"] = bytes(vcpu.get_vcpu_events())
    return document


def load_all(vcpus: Sequence[Vcpu], documents: Sequence[Mapping[str, Any]]) -> None:
    """`load` for all vcpus of a machine, their TSCs as far apart as they were: usually not at all."""
    if len(vcpus) != len(documents):
        raise StateError(f"the state is of {len(documents)} vcpus, and the machine has {len(vcpus)}")
    shift = None
    for vcpu, document in zip(vcpus, documents, strict=True):
        shift = load(vcpu, document, shift)


def load(vcpu: Vcpu, document: Mapping[str, Any], tsc_shift: int | None = None) -> int | None:
    """Put a saved state into a fresh vcpu. Raises StateError for a document that cannot be right, KvmError.

    The guest's TSC goes on from where it was saved. ``tsc_shift`` is what the first vcpu's load returned: the others
    get exactly its change of TSC offset, so that the kernel sees them as synchronised. None where it has no such offset.
    """
    integer(document, "version", VERSION, VERSION)
    vcpu.set_cpuid(_cpuid(document))
    _load_tsc_rate(vcpu, integer(document, "tsc_khz", 0, 1 << 31))
    sregs = _structure(cs.Sregs, document, "sregs")
    vcpu.set_sregs(sregs)
    vcpu.set_xcrs(_structure(cs.Xcrs, document, "xcrs"))
    vcpu.set_xsave(bytearray(blob(document, "xsave", vcpu.xsave_size)))
    vcpu.set_debugregs(_structure(cs.DebugRegs, document, "debugregs"))
    if vcpu.has_lapic:
        vcpu.set_lapic(_structure(cs.Lapic, document, "lapic"))
    tsc_shift = _load_tsc(vcpu, document, tsc_shift)
    _load_msrs(vcpu, _msrs(document))
    vcpu.set_regs(_structure(cs.Regs, document, "regs"))
    vcpu.set_mp_state(MpState(integer(document, "mp_state", 0, max(MpState))))
    vcpu.set_vcpu_events(_structure(cs.VcpuEvents, document, "events"))
    return tsc_shift


def saved_cpuid(document: Mapping[str, Any]) -> list[CpuidEntry]:
    """What the saved vcpu's CPUID said: for `posada.vmm.cpuid.missing_features`. Raises StateError."""
    return _cpuid(document)


def tell_paused(vcpu: Vcpu) -> None:
    """Tell a guest with kvm-clock that it stood still (KVM_KVMCLOCK_CTRL); nothing for one that does not use it."""
    try:
        vcpu.kvmclock_ctrl()
    except KvmError as error:
        if error.errno != EINVAL:
            raise


def _structure(kind: type[AnyStructure], document: Mapping[str, Any], key: str) -> AnyStructure:
    return kind.from_buffer_copy(blob(document, key, sizeof(kind)))


def _cpuid(document: Mapping[str, Any]) -> list[CpuidEntry]:
    data = blob(document, "cpuid", limit=MAX_CPUID_ENTRIES * sizeof(CpuidEntry))
    if len(data) % sizeof(CpuidEntry):
        raise StateError("'cpuid' is not a whole number of entries")
    return [CpuidEntry.from_buffer_copy(data, at) for at in range(0, len(data), sizeof(CpuidEntry))]


def _save_msrs(vcpu: Vcpu) -> bytes:
    """Index and value of each, as struct kvm_msr_entry. One that the kernel lists but does not read is left out."""
    wanted = [index for index in vcpu.state_msrs if index != MSR_TSC and index not in HYPERV_MSRS]
    values: dict[int, int] = {}
    while wanted:
        part = vcpu.get_msrs(wanted)
        values.update(part)
        wanted = wanted[len(part) + 1 :]  # the one it stopped at is not readable
    vcpu.state_msrs = tuple(values)  # next time in one call
    return b"".join(bytes(cs.MsrEntry(index, 0, value)) for index, value in values.items())


def _msrs(document: Mapping[str, Any]) -> dict[int, int]:
    data = blob(document, "msrs", limit=MAX_MSR_ENTRIES * sizeof(cs.MsrEntry))
    if len(data) % sizeof(cs.MsrEntry):
        raise StateError("'msrs' is not a whole number of entries")
    entries = [cs.MsrEntry.from_buffer_copy(data, at) for at in range(0, len(data), sizeof(cs.MsrEntry))]
    return {entry.index: entry.data for entry in entries}


def _load_msrs(vcpu: Vcpu, values: dict[int, int]) -> None:
    """One the kernel refuses is no fault if it has that value already (a read-only one), or if it was 0 and is unknown.

    Only MSRs that hold state here are accepted: a document cannot reach others. Raises StateError, KvmError.
    """
    known = set(vcpu.state_msrs) - {MSR_TSC, *HYPERV_MSRS}
    strange = [index for index, value in values.items() if index not in known and value]
    if strange:
        raise StateError(f"MSR {strange[0]:#x} has a value, and this host does not have it")
    rest = [(index, value) for index, value in values.items() if index in known]
    while rest:
        done = vcpu.set_msrs(dict(rest))
        if done < len(rest):
            index, value = rest[done]
            if vcpu.get_msrs([index]).get(index) != value:
                raise KvmError(
                    "KVM_SET_MSRS", EINVAL, detail=f"MSR {index:#x} = {value:#x}", hint="another kind of host?"
                )
        rest = rest[done + 1 :]


def _load_tsc_rate(vcpu: Vcpu, khz: int) -> None:
    """The guest's TSC runs at the rate it had. Without scaling in hardware another rate is refused."""
    if khz and khz != vcpu.get_tsc_khz():
        vcpu.set_tsc_khz(khz)


def _load_tsc(vcpu: Vcpu, document: Mapping[str, Any], shift: int | None) -> int | None:
    """By offset where kernel and document have one; else by the MSR, whose guesses the kernel may round to another vcpu's
    (within a second it takes a write for an attempt to synchronise)."""
    tsc = integer(document, "tsc", 0, U64)
    if "tsc_offset" not in document or not vcpu.has_tsc_offset():
        vcpu.set_msrs({MSR_TSC: tsc})
        return None
    saved = integer(document, "tsc_offset", 0, U64)
    if shift is None:
        now = vcpu.get_msrs([MSR_TSC]).get(MSR_TSC, 0)
        shift = (vcpu.get_tsc_offset() + tsc - now - saved) & U64
    vcpu.set_tsc_offset((saved + shift) & U64)
    return shift
