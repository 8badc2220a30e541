"""What a container may do: its capabilities, and the system calls that are refused to it.

**Capabilities** are Docker's default ones, more or fewer. Source: capabilities(7); the default set is the one that
Docker documents ("Runtime privilege and Linux capabilities").

**System calls** are refused that reach the host around the container's namespaces and capabilities. A short list of
what to refuse, unlike Docker's long list of what to allow: it does not age with each kernel's new calls, and it keeps
less out. What needs a capability that the container lacks is not listed, the kernel refuses it. Format: OCI runtime
specification, config-linux.md, "Seccomp".
"""

from __future__ import annotations

import errno
import platform
from collections.abc import Sequence
from typing import Any

from unionfs.errors import RunError

DEFAULT_CAPABILITIES = (
    "AUDIT_WRITE",
    "CHOWN",
    "DAC_OVERRIDE",
    "FOWNER",
    "FSETID",
    "KILL",
    "MKNOD",
    "NET_BIND_SERVICE",
    "NET_RAW",
    "SETFCAP",
    "SETGID",
    "SETPCAP",
    "SETUID",
    "SYS_CHROOT",
)
# In the order of their numbers, linux/capability.h.
ALL_CAPABILITIES = (
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "NET_RAW",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
)

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


def choose_capabilities(add: Sequence[str], drop: Sequence[str]) -> tuple[str, ...] | None:
    """The names that are left after dropping and adding; None if neither was asked for.

    Args:
        add, drop: names with or without ``CAP_``, in any case; ``ALL`` is all.

    Raises:
        RunError: there is no such capability.
    """
    if not add and not drop:
        return None
    added, dropped = _capability_names(add), _capability_names(drop)
    return tuple(
        name for name in ALL_CAPABILITIES if name in added or (name in DEFAULT_CAPABILITIES and name not in dropped)
    )


def _capability_names(given: Sequence[str]) -> set[str]:
    found: set[str] = set()
    for text in given:
        name = text.upper().removeprefix("CAP_")
        if name == "ALL":
            found |= set(ALL_CAPABILITIES)
        elif name in ALL_CAPABILITIES:
            found.add(name)
        else:
            raise RunError(f"there is no capability {text[:50]}; capabilities(7) has their names")
    return found


def held_capabilities() -> set[str]:
    """The capabilities that we may pass on, which a container manager or service may have limited."""
    with open("/proc/self/status", encoding="ascii") as file:
        mask = next(int(line.split()[1], 16) for line in file if line.startswith("CapBnd:"))
    return {name for number, name in enumerate(ALL_CAPABILITIES) if mask >> number & 1}


def seccomp_profile() -> dict[str, Any]:
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
