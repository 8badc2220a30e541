"""What FUSE of this kernel offers, asked by a mount of an empty directory that lasts for a moment.

The kernel tells its version and capabilities in the first request of a session, and nowhere else.
Source: include/uapi/linux/fuse.h, ``struct fuse_init_in``.
"""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from unionfs.errors import MountError
from unionfs.fuse_ops.transports import mounting
from unionfs.fuse_ops.transports.direct.protocol import IN_HEADER, INIT_IN, Init, Opcode
from unionfs.host import unmount

_LEAST_READ_BYTES: Final = 8192  # linux/fuse.h: FUSE_MIN_READ_BUFFER


@dataclass(frozen=True, slots=True)
class KernelOffer:
    """What the kernel says of itself.

    Attributes:
        version: of the protocol, such as ``(7, 45)``.
        capabilities: see :class:`unionfs.fuse_ops.transports.direct.protocol.Init`.
    """

    version: tuple[int, int]
    capabilities: int

    def has(self, capability: Init) -> bool:
        """Whether the kernel offers it."""
        return bool(self.capabilities & capability)


def ask_kernel() -> KernelOffer:
    """Mount, read the first request, and unmount.

    Raises:
        MountError: this user cannot mount here; the message says why.
    """
    with tempfile.TemporaryDirectory(prefix="unionfs-info-") as directory:
        fd = mounting.mount(directory, [], "unionfs-info")
        try:
            request = os.read(fd, _LEAST_READ_BYTES)
        except OSError as error:
            raise MountError(f"the kernel does not begin a session: {error.strerror}; see dmesg") from error
        finally:
            os.close(fd)  # before unmounting, which would wait for an answer
            with suppress(OSError):
                unmount.unmount(directory, lazy=True)
    return _parsed(request)


def _parsed(request: bytes) -> KernelOffer:
    code = IN_HEADER.unpack_from(request)[1]
    if code != Opcode.INIT:
        raise MountError(f"the kernel begins a session with request {code}; this version of unionfs does not know that")
    major, minor, _, low, high = INIT_IN.unpack_from(request, IN_HEADER.size)
    return KernelOffer((major, minor), low | (high << 32 if low & Init.INIT_EXT else 0))
