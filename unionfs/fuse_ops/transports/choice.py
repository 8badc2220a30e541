"""What a session needs of a transport, and which one serves a mount."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Final, Protocol

from unionfs.errors import MountError
from unionfs.fuse_ops.options import MountOptions
from unionfs.fuse_ops.union.union_tree import UnionTree

# FUSE 7.36, with room for more than 32 capabilities in INIT.
_DIRECT_SINCE: Final = (5, 17)


class Transport(Protocol):
    """Brings the kernel's requests to the file system and its answers back."""

    @property
    def name(self) -> str:
        """What ``unionfs mounts`` calls it."""

    def mount(self, target: str) -> None:
        """Mount on ``target``, a directory or ``/dev/fd/N`` of a mount made already; raises MountError."""

    async def serve(self, accepted: Callable[[], None], gone: Callable[[], None]) -> None:
        """Answer requests until the mount is gone.

        ``accepted`` is called when the kernel has begun the session, ``gone`` when the mount is gone, while something
        may still be written.
        """

    def close(self) -> None:
        """Give up the connection to the kernel."""


def choose_transport(tree: UnionTree, options: MountOptions) -> Transport:
    """The transport that ``options`` ask for, or the fastest that this kernel can do.

    Raises:
        MountError: it is pyfuse3, which is not installed or cannot be loaded.
    """
    wanted, _ = transport_for(options.transport)
    # Imported when chosen: pyfuse3 takes a good part of the time that a mount takes.
    if wanted == "direct":
        from unionfs.fuse_ops.transports.direct.transport import DirectTransport

        return DirectTransport(tree, options)
    from unionfs.fuse_ops.speedups.late_sync import LateSync

    try:
        from unionfs.fuse_ops.transports.pyfuse3 import Pyfuse3Transport, UnionOperations
    except ImportError as error:
        raise MountError(_without_pyfuse3(error)) from error

    operations = UnionOperations(tree, options)
    return Pyfuse3Transport(operations, options, LateSync(operations.requests))


def transport_for(wanted: str) -> tuple[str, str]:
    """The transport that the option ``transport`` of this value gets, and why."""
    if wanted != "auto":
        return wanted, "asked for"
    if chosen := os.environ.get("UNIONFS_TRANSPORT"):
        return chosen, "UNIONFS_TRANSPORT says so"
    major, minor = _DIRECT_SINCE
    if _kernel_version() >= _DIRECT_SINCE:
        return "direct", f"the kernel is Linux {major}.{minor} or newer"
    return "pyfuse3", f"the kernel is older than Linux {major}.{minor}"


def _without_pyfuse3(error: ImportError) -> str:
    is_missing = isinstance(error, ModuleNotFoundError) and error.name == "pyfuse3"
    reason = "which is not installed" if is_missing else f"which cannot be loaded ({error})"
    text = f"the transport pyfuse3 needs the Python package pyfuse3, {reason}; install unionfs[pyfuse3]"
    if _kernel_version() >= _DIRECT_SINCE:
        return f"{text}, or mount with transport=direct"
    return f"{text}: before Linux 5.17 there is no other transport"


def _kernel_version() -> tuple[int, int]:
    major, minor = os.uname().release.split(".")[:2]
    return int(major), int("".join(c for c in minor if c.isdigit()) or 0)
