"""What root of a container may do: Docker's default capabilities, more or fewer of them.

Source: capabilities(7); the default set is the one that Docker documents ("Runtime privilege and Linux capabilities").
"""

from __future__ import annotations

from collections.abc import Sequence

from unionfs.errors import RunError

DEFAULT = (
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
ALL = (
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


def chosen(add: Sequence[str], drop: Sequence[str]) -> tuple[str, ...] | None:
    """The names that are left after dropping and adding; None if neither was asked for.

    Args:
        add, drop: names with or without ``CAP_``, in any case; ``ALL`` is all.

    Raises:
        RunError: there is no such capability.
    """
    if not add and not drop:
        return None
    added, dropped = _names(add), _names(drop)
    return tuple(name for name in ALL if name in added or (name in DEFAULT and name not in dropped))


def _names(words: Sequence[str]) -> set[str]:
    found: set[str] = set()
    for word in words:
        name = word.upper().removeprefix("CAP_")
        if name == "ALL":
            found |= set(ALL)
        elif name in ALL:
            found.add(name)
        else:
            raise RunError(f"there is no capability {word[:50]}; capabilities(7) has their names")
    return found


def held() -> set[str]:
    """The capabilities that we may pass on, which a container manager or service may have limited."""
    with open("/proc/self/status", encoding="ascii") as file:
        mask = next(int(line.split()[1], 16) for line in file if line.startswith("CapBnd:"))
    return {name for number, name in enumerate(ALL) if mask >> number & 1}
