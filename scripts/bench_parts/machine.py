"""The machine that the figures are from, for whoever reads them later."""

from __future__ import annotations

import datetime
import os
import platform


def describe(scale: str, rounds: int, rootfs: str, beside: int = 0) -> dict[str, str]:
    """What to say beside the figures; ``beside`` is the number of processes that compute meanwhile."""
    said = {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "kernel": os.uname().release,
        "processor": f"{os.cpu_count()} x {_processor()}",
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / (1 << 30):.0f} GiB",
        "python": platform.python_version(),
        "layers": rootfs,
        "scale": scale,
        "rounds": str(rounds),
        "load before": f"{os.getloadavg()[0]:.1f}",
    }
    return said | ({"beside": f"{beside} computing"} if beside else {})


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
            return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()
