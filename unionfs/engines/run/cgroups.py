"""Which limits of memory, processors and processes this machine's control groups can hold a container to.

The runtime makes the group; here is found out before whether it can. Sources: cgroups(7); Linux,
Documentation/admin-guide/cgroup-v1 and cgroup-v2.rst.
"""

from __future__ import annotations

import os

_ROOT = "/sys/fs/cgroup"
_CONTROLLERS = {"memory": "memory", "cpus": "cpu", "pids-limit": "pids"}
"""The controller that each limit needs, by the option of ``unionfs run``."""


def limits_here(*, rootless: bool) -> dict[str, str]:
    """Why each limit is not possible, by its option; empty for one that is.

    Args:
        rootless: we are an ordinary user or root of a user namespace only.
    """
    if rootless:
        why = "an ordinary user's container has no control group of its own; run unionfs run as root, or under: "
        why += "systemd-run --user --scope -p MemoryMax=1G -p CPUQuota=50% -p TasksMax=100"
        return dict.fromkeys(_CONTROLLERS, why)
    return {limit: _why_not(controller) for limit, controller in _CONTROLLERS.items()}


def _why_not(controller: str) -> str:
    try:
        with open(f"{_ROOT}/cgroup.controllers", encoding="ascii") as file:
            there = controller in file.read().split()
        place = _ROOT
    except OSError:
        place = f"{_ROOT}/{controller}"
        there = os.path.exists(f"{place}/cgroup.procs")
    if not there:
        return f"this machine has no cgroup controller {controller} at {_ROOT}; see /proc/cgroups"
    if not os.access(place, os.W_OK, effective_ids=True) or os.statvfs(place).f_flag & os.ST_RDONLY:
        return f"{place} is read-only here; run unionfs on the host, or mount it read-write"
    return ""
