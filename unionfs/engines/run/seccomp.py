"""System calls that are refused in a container: those that reach the host around its namespaces and capabilities.

A short list of what to refuse, unlike Docker's long list of what to allow: it does not age with each kernel's new
calls, and it keeps less out. What needs a capability that the container lacks is not listed, the kernel refuses it.
Format: OCI runtime specification, config-linux.md, "Seccomp".
"""

from __future__ import annotations

import errno
import platform
from typing import Any

_CLONE_NEWUSER = 0x10000000  # linux/sched.h
_AF_VSOCK = 40  # linux/socket.h

_REFUSED = (
    # Keyrings belong to a user id, not to a container.
    "add_key",
    "keyctl",
    "request_key",
    # Large parts of the kernel that few programs need, where faults have let containers out.
    "bpf",
    "io_uring_enter",
    "io_uring_register",
    "io_uring_setup",
    "perf_event_open",
    "userfaultfd",
    # Opens files by number, whatever directory they are in.
    "open_by_handle_at",
)
# An architecture that is not named is refused as a whole, so the 32-bit calls of a 64-bit processor are.
_ARCHITECTURES = {
    "x86_64": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
    "aarch64": ["SCMP_ARCH_AARCH64", "SCMP_ARCH_ARM"],
    "ppc64le": ["SCMP_ARCH_PPC64LE"],
    "riscv64": ["SCMP_ARCH_RISCV64"],
    "s390x": ["SCMP_ARCH_S390X", "SCMP_ARCH_S390"],
}


def profile() -> dict[str, Any]:
    """The ``linux.seccomp`` object of a runtime configuration for this machine."""
    machine = platform.machine()
    flags_argument = 1 if machine == "s390x" else 0  # of clone(2)
    return {
        "defaultAction": "SCMP_ACT_ALLOW",
        **({"architectures": _ARCHITECTURES[machine]} if machine in _ARCHITECTURES else {}),
        "syscalls": [
            _refuse(list(_REFUSED)),
            # A user namespace gives all capabilities inside of it, and with them most of the kernel to attack.
            _refuse(["unshare"], args=[_has_bits(0, _CLONE_NEWUSER)]),
            _refuse(["clone"], args=[_has_bits(flags_argument, _CLONE_NEWUSER)]),
            # Its flags are in memory, where no filter can read them; C libraries go on with clone.
            _refuse(["clone3"], errno.ENOSYS),
            # Sockets to the hypervisor know no network namespace.
            _refuse(["socket"], args=[{"index": 0, "value": _AF_VSOCK, "op": "SCMP_CMP_EQ"}]),
        ],
    }


def _refuse(names: list[str], number: int = errno.EPERM, args: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    rule: dict[str, Any] = {"names": names, "action": "SCMP_ACT_ERRNO", "errnoRet": number}
    return rule | ({"args": args} if args else {})


def _has_bits(index: int, bits: int) -> dict[str, Any]:
    return {"index": index, "value": bits, "valueTwo": bits, "op": "SCMP_CMP_MASKED_EQ"}
