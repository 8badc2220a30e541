"""Every exception that unionfs raises on purpose, each with the next step in its message.

System call errors inside the file system stay plain :class:`OSError`: their errno is the answer a program
gets. The classes here are for people: a message is one line that names the thing and says what to do.
"""

from __future__ import annotations

import errno


class UnionfsError(Exception):
    """Base of all errors meant for a person; ``str(error)`` is one line."""


class OptionError(UnionfsError):
    """A mount option, or a combination of options, that cannot work."""


class LayerError(UnionfsError):
    """A layer, upper or work directory that cannot be used as such."""


class MountError(UnionfsError):
    """The kernel or the host refused the mount."""


class ListenError(UnionfsError):
    """A server cannot listen on the socket that it was given."""


class ArchiveError(UnionfsError):
    """A tar archive that cannot be read, unpacked or made."""


class BreakoutError(ArchiveError):
    """An archive entry that points outside of the directory it is unpacked into."""


class DriverError(UnionfsError):
    """A graph driver that cannot do what it was asked to."""


class NotSupportedError(DriverError):
    """A driver that cannot work on this host; automatic selection goes on with the next one."""


class PrerequisitesError(NotSupportedError):
    """A driver that lacks something of the host: a kernel feature, a program, a device."""


class IncompatibleFilesystemError(NotSupportedError):
    """A driver whose home lies on a file system that it cannot use."""


class QuotaNotSupportedError(NotSupportedError):
    """A size limit where nothing can enforce one."""


class LayerNotFoundError(DriverError, FileNotFoundError):
    """A layer id that the driver does not have. ``errno`` is ENOENT."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.errno = errno.ENOENT


class LayerExistsError(DriverError, FileExistsError):
    """A layer id that is taken already. ``errno`` is EEXIST."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.errno = errno.EEXIST


class LayerBusyError(DriverError):
    """A layer that somebody uses: the message says who. Nothing was changed; the call may be repeated."""


class LayerStoreError(UnionfsError):
    """Something in the layer store that cannot be done."""


class InvalidDigestError(LayerStoreError, ValueError):
    """A text that is no sha256 digest."""


class DigestMismatchError(LayerStoreError):
    """A layer whose contents have another digest than the one that was expected."""


class LayerDamagedError(LayerStoreError):
    """A stored layer that no longer gives the bytes that it was registered with."""


class LayerDoesNotExistError(LayerStoreError, LookupError):
    """A chain id that the store does not have (Docker's ErrLayerDoesNotExist)."""


class LayerNotRetainedError(LayerStoreError):
    """A handle that was released before, or never was one (Docker's ErrLayerNotRetained)."""


class MountDoesNotExistError(LayerStoreError, LookupError):
    """A read-write layer's name that the store does not have (Docker's ErrMountDoesNotExist)."""


class MountNameConflictError(LayerStoreError):
    """A read-write layer's name that is taken (Docker's ErrMountNameConflict)."""


class ActiveMountError(LayerStoreError):
    """A read-write layer that cannot be removed while it is mounted (Docker's ErrActiveMount)."""


class NotMountedError(LayerStoreError):
    """A read-write layer that is not mounted (Docker's ErrNotMounted)."""


class MaxDepthExceededError(LayerStoreError):
    """A chain of more layers than a container could be started from (Docker's ErrMaxDepthExceeded)."""


class MetadataError(LayerStoreError):
    """A file of the layer store's metadata that is missing or cannot be understood; the message names it."""


class StoreNotFoundError(LayerStoreError):
    """There is no layer store, and one is only to be looked at."""


class StoreLockedError(LayerStoreError):
    """A layer store that another process has open.

    Attributes:
        lock: path of the lock's file, to wait for; empty when this process itself has it open.
    """

    def __init__(self, message: str, lock: str = "") -> None:
        super().__init__(message)
        self.lock = lock


class TarSplitError(LayerStoreError):
    """A tar-split stream that cannot be read."""


class SnapshotterError(UnionfsError):
    """Something in a snapshotter that cannot be done on this host."""


class SnapshotNotFoundError(SnapshotterError, LookupError):
    """A snapshot's name that does not exist (containerd's ErrNotFound)."""


class SnapshotExistsError(SnapshotterError):
    """A snapshot's name that is taken (containerd's ErrAlreadyExists)."""


class SnapshotStateError(SnapshotterError):
    """A snapshot that this cannot be done with as it is (containerd's ErrFailedPrecondition)."""


class SnapshotArgumentError(SnapshotterError, ValueError):
    """Arguments that can never work (containerd's ErrInvalidArgument)."""


class RunError(UnionfsError):
    """A container that cannot be run."""


class CommandNotFoundError(RunError):
    """A command that the container's files do not have."""


class CommandNotExecutableError(RunError):
    """A command that is there, and cannot be executed."""


class ImageError(UnionfsError):
    """Something with an image that cannot be done."""


class ImageFormatError(ImageError):
    """An image, or an archive or directory of images, that cannot be understood or contradicts itself."""


class NotAnImageError(ImageFormatError):
    """A manifest of something that is no image, such as a chart, a signature or an attestation."""


class ImageNotFoundError(ImageError, LookupError):
    """A name or an id that no image has."""


class ImageInUseError(ImageError):
    """An image that cannot be removed while something needs it; the message says what."""


class RegistryError(ImageError):
    """A registry that refused, or gave a wrong answer, or none."""
