"""An XFS file system in a file, with project quotas where the kernel was built with them."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.mounts import take_down

_SIZE_BYTES = 512 << 20  # mkfs.xfs makes no smaller one than 300 MB; it is sparse


@contextmanager
def mounted_xfs(image: Path, mount_point: Path) -> Iterator[bool]:
    """A fresh file system at ``mount_point``; gives whether it has project quotas (CONFIG_XFS_QUOTA)."""
    mount_point.mkdir(parents=True)
    with open(image, "wb") as file:
        file.truncate(_SIZE_BYTES)
    subprocess.run(["mkfs.xfs", "-q", image], check=True)
    has_quotas = _mount(image, mount_point, "loop,pquota")
    if not has_quotas:
        assert _mount(image, mount_point, "loop")
    try:
        yield has_quotas
    finally:
        faults = take_down(os.fspath(mount_point))
        image.unlink()
    assert not faults, "; ".join(faults)


def _mount(image: Path, mount_point: Path, options: str) -> bool:
    command: list[str | Path] = ["mount", "-t", "xfs", "-o", options, image, mount_point]
    return subprocess.run(command, stderr=subprocess.DEVNULL, check=False).returncode == 0
