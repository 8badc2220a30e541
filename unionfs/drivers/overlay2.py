"""The ``overlay2`` driver: the kernel's overlayfs over Docker's home layout.

Docker's own driver of that name and this one can open each other's homes (not at the same time).
"""

from __future__ import annotations

from collections.abc import Sequence

from unionfs.archive.idmapping import IdMapping
from unionfs.drivers.kernel_overlay import KernelMounter, OverlayFacts, probe
from unionfs.drivers.layered import LayeredDriver, SizeLimits
from unionfs.drivers.overlay_home import OverlayHome
from unionfs.drivers.quota import NoQuota, project_limits
from unionfs.drivers.storage_options import parse_options, parse_size
from unionfs.errors import QuotaNotSupportedError
from unionfs.host.fs_magic import fs_magic, fs_name

_OPTIONS = ("overlay2.size", "overlay2.override_kernel_check")


def init(root: str, options: Sequence[str], id_mapping: IdMapping) -> Overlay2Driver:
    """Make the driver with its home at ``root`` (an :data:`unionfs.drivers.contract.InitFunc`).

    Option: ``overlay2.size`` (limit for container layers without one of their own; needs xfs with pquota).
    ``overlay2.override_kernel_check`` is accepted and has no effect: the kernel is tried, not its version looked at.

    Raises:
        PrerequisitesError: this kernel has no overlayfs, or we may not mount it.
        IncompatibleFilesystemError: overlayfs cannot use the file system of ``root``.
    """
    given = parse_options(options, _OPTIONS, "overlay2")
    layers = OverlayHome(root, id_mapping)
    facts = probe(layers.root)
    size = parse_size(given.get("overlay2.size", "0"))
    limits = project_limits(layers.root)
    if size:
        limits.check()
    return Overlay2Driver(layers, facts, id_mapping, limits, size)


def look(root: str, options: Sequence[str], id_mapping: IdMapping) -> Overlay2Driver:
    """The driver to look at a home with (a :data:`unionfs.drivers.contract.LookFunc`); options are as for init."""
    parse_options(options, _OPTIONS, "overlay2")
    # The kernel is not tried. Since Linux 4.8 an upper directory holds exactly what was changed.
    facts = OverlayFacts(supports_d_type=True, metacopy=False, native_diff=True, userxattr=False)
    limits = NoQuota(QuotaNotSupportedError("the store is opened to be read only"))
    return Overlay2Driver(OverlayHome(root, id_mapping), facts, id_mapping, limits, 0, read_only=True)


class Overlay2Driver(LayeredDriver):
    """See :func:`init`."""

    def __init__(
        self,
        layers: OverlayHome,
        facts: OverlayFacts,
        id_mapping: IdMapping,
        limits: SizeLimits,
        default_size_bytes: int,
        *,
        read_only: bool = False,
    ) -> None:
        self._facts = facts
        super().__init__(
            "overlay2",
            layers,
            KernelMounter(),
            limits,
            id_mapping,
            default_size_bytes=default_size_bytes,
            native_diff=facts.native_diff,
            read_only=read_only,
        )

    def status(self) -> list[tuple[str, str]]:
        """See :meth:`ProtoDriver.status`; the keys are Docker's."""
        return [
            ("Backing Filesystem", fs_name(fs_magic(self._layers.root))),
            ("Supports d_type", _word(self._facts.supports_d_type)),
            ("Using metacopy", _word(self._facts.metacopy)),
            ("Native Overlay Diff", _word(self._facts.native_diff)),
            ("userxattr", _word(self._facts.userxattr)),
        ]


def _word(value: bool) -> str:
    return "true" if value else "false"
