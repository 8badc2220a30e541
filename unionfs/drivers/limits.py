"""What enforces the size of a layered driver's layer: the file system below, the union itself, or nothing."""

from __future__ import annotations

import os

from unionfs.drivers.layered import SizeLimits
from unionfs.drivers.overlay_home import LayerPaths
from unionfs.drivers.quota import ProjectQuota
from unionfs.errors import DriverError, QuotaNotSupportedError
from unionfs.fuse_ops.options import parse_options

SIZE_NAME = "size"
"""The file in a layer's directory that holds its limit in bytes; overlay2 does not have one and ignores it."""

_SIZE_MAX_CHARACTERS = 19  # 2^63 - 1 has as many digits


class NoLimits:
    """:class:`SizeLimits` where nothing can enforce one; ``error`` says why."""

    def __init__(self, error: QuotaNotSupportedError) -> None:
        self._why = str(error)

    def check(self) -> None:
        """See :meth:`SizeLimits.check`."""
        raise QuotaNotSupportedError(self._why)

    def apply(self, directory: str, size_bytes: int) -> None:
        """See :meth:`SizeLimits.apply`."""
        self.check()

    def mount_limit(self, paths: LayerPaths) -> int:
        """See :meth:`SizeLimits.mount_limit`."""
        return 0


class ProjectLimits:
    """:class:`SizeLimits` by project quota."""

    def __init__(self, quota: ProjectQuota) -> None:
        self._quota = quota

    def check(self) -> None:
        """See :meth:`SizeLimits.check`."""

    def apply(self, directory: str, size_bytes: int) -> None:
        """See :meth:`SizeLimits.apply`."""
        self._quota.apply(directory, size_bytes)

    def mount_limit(self, paths: LayerPaths) -> int:
        """See :meth:`SizeLimits.mount_limit`: the file system below does it."""
        return 0


class UnionLimits:
    """:class:`SizeLimits` enforced by the server of the mount, which is told with the option ``quota``."""

    def check(self) -> None:
        """See :meth:`SizeLimits.check`."""

    def apply(self, directory: str, size_bytes: int) -> None:
        """See :meth:`SizeLimits.apply`: the number is kept beside the layer, for every mount to come."""
        with open(os.path.join(directory, SIZE_NAME), "w", encoding="ascii") as file:
            file.write(str(size_bytes))

    def mount_limit(self, paths: LayerPaths) -> int:
        """See :meth:`SizeLimits.mount_limit`."""
        path = os.path.join(paths.base, SIZE_NAME)
        try:
            with open(path, "rb") as file:
                text = file.read(_SIZE_MAX_CHARACTERS + 1).strip()
        except FileNotFoundError:
            return 0
        if text and not (text.isdigit() and len(text) <= _SIZE_MAX_CHARACTERS and int(text) < 1 << 63):
            raise DriverError(f"{path} holds {text[:20]!r}; write a number of bytes into it, or remove it for no limit")
        return int(text or b"0")


def project_limits(home: str) -> SizeLimits:
    """Limits by project quota, or the reason why there are none."""
    try:
        return ProjectLimits(ProjectQuota(home))
    except QuotaNotSupportedError as error:
        return NoLimits(error)


def union_limits(home: str) -> SizeLimits:
    """Limits by project quota where the file system has them, otherwise by the union itself."""
    limits = project_limits(home)
    return UnionLimits() if isinstance(limits, NoLimits) and _union_knows_quota() else limits


def _union_knows_quota() -> bool:
    return not parse_options(["lowerdir=/,quota=4096"]).ignored
