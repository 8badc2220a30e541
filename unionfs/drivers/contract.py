"""The contract of graph drivers: what a layer store asks, and what every driver answers.

A driver keeps file trees under opaque ids. A tree is made over a parent, which it shows until something is changed
in it; the changes can be listed, exported as a tar stream, and applied to another tree. The names, the meaning of the
calls and the ``diff`` stream are those of Docker's ``graphdriver`` package, so that a driver here can
stand behind a Docker plugin, and a Docker plugin behind a driver here.

A worked example, three layers and a container::

    driver.create("base")                       # an empty tree
    driver.apply_diff("base", "", base_tar)     # ... filled from the image's first layer
    driver.create("top", "base")                # shows base
    driver.apply_diff("top", "base", top_tar)   # ... and the second layer's changes
    driver.create_read_write("run", "top")      # a container's own tree
    path = driver.get("run")                    # mounted: a directory to run the container in
    ...
    driver.changes("run", "top")                # what the container changed, also while it runs
    with driver.diff("run", "top") as stream:   # the same as a layer for the next image
        ...
    driver.put("run")                           # unmounted
    driver.remove("run")                        # and gone

Rules for every driver:

- An id is a name for one directory: not empty, no ``/`` and no NUL, not ``.`` or ``..``, nor one that the driver's
  layout uses itself (:func:`check_layer_id`). A parent is an id, or ``""`` for none.
- A driver may be called from many threads at once. Calls for one id wait for each other, others do not.
- One process at a time uses a home. Another one may open it later and finds what the first left, mounts included.
- A tree that has children must not be changed any more; the layered drivers mount such a tree read-only.
- A call that raises has changed nothing, or can be repeated; nothing of a failed ``create`` is left.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import BinaryIO, Protocol, runtime_checkable

from unionfs.archive.changes import Change
from unionfs.archive.idmapping import IdMapping
from unionfs.archive.tar_reader import Readable
from unionfs.errors import DriverError


@dataclass(frozen=True, slots=True, kw_only=True)
class CreateOptions:
    """What a new tree is to be like.

    Attributes:
        mount_label: SELinux context for the files (``system_u:object_r:container_file_t:s0:c1,c2``); empty for none.
        storage_options: driver options for this tree alone, such as ``{"size": "10G"}``. Keys are compared in lower
            case; one that the driver does not know is an error.
    """

    mount_label: str = ""
    storage_options: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """What a driver promises beyond the calls.

    Attributes:
        reproduces_exact_diffs: ``diff`` gives, byte for byte, the stream that ``apply_diff`` was given. A store need
            not record the layout of the stream then.
    """

    reproduces_exact_diffs: bool = False


class ProtoDriver(Protocol):
    """A driver of trees that does not know about differences; :mod:`unionfs.drivers.naive_diff` adds them."""

    @property
    def name(self) -> str:
        """The driver's name, also part of the paths of stores (``image/NAME/layerdb``)."""

    def create(self, layer_id: str, parent: str = "", options: CreateOptions | None = None) -> None:
        """Make the tree ``layer_id``: empty, or showing ``parent``. It is to be an image's layer.

        Raises:
            LayerExistsError: there is one of this id.
            LayerNotFoundError: there is no ``parent``.
            OptionError: a storage option that is unknown, or not for layers of images (``size``).
            DriverError: the id cannot be used as such, or the stack would be too deep.
        """

    def create_read_write(self, layer_id: str, parent: str = "", options: CreateOptions | None = None) -> None:
        """As :meth:`create`, for a tree that a container writes to. Here ``size`` is allowed.

        Raises:
            QuotaNotSupportedError: a size is asked for and nothing here can enforce it.
        """

    def remove(self, layer_id: str) -> None:
        """Delete the tree, unmounting it first however often it was got. An unknown id is no error.

        Raises:
            LayerBusyError: a process uses the mounted tree, or another tree has it as parent. The tree is as it was.
            DriverError: the id is empty or cannot be one.
        """

    def get(self, layer_id: str, mount_label: str = "") -> str:
        """Mount the tree if it is not yet, and return the absolute path of its root. Undone by one :meth:`put`.

        Args:
            layer_id: the tree.
            mount_label: SELinux context for all files of the mount; empty for none.

        Raises:
            LayerNotFoundError: there is none of this id.
            MountError: the mount failed; what was begun is undone.
        """

    def put(self, layer_id: str) -> None:
        """Undo one :meth:`get`; the last one unmounts. Without a get before, or for an unknown id, nothing happens.

        A tree that is still in use is taken out of sight; its mount ends with its last user.
        """

    def exists(self, layer_id: str) -> bool:
        """Whether there is a tree of this id. Never raises."""

    def status(self) -> list[tuple[str, str]]:
        """Facts about the driver for people (``docker info``), in order."""

    def get_metadata(self, layer_id: str) -> dict[str, str]:
        """Facts about one tree for people and tools: its directories on disk. The keys are Docker's.

        Raises:
            LayerNotFoundError: there is none of this id.
        """

    def cleanup(self) -> None:
        """Unmount everything, at the end of the process that uses the driver. May be called again."""


class DiffDriver(Protocol):
    """The calls about differences. ``parent`` is ``""`` for "compared with nothing"."""

    def diff(self, layer_id: str, parent: str = "") -> BinaryIO:
        """The changes from ``parent`` as an uncompressed tar stream, whiteouts in the ``.wh.`` form.

        The same trees give the same bytes. The caller closes the stream, at its end or before; until then the trees
        may stay mounted. Reading raises :class:`unionfs.errors.ArchiveError` for what cannot be archived.

        Raises:
            LayerNotFoundError: there is no ``layer_id`` or no ``parent``.
        """

    def changes(self, layer_id: str, parent: str = "") -> list[Change]:
        """What was added, changed or deleted since ``parent``, in the byte order of the paths.

        Raises:
            LayerNotFoundError: there is no ``layer_id`` or no ``parent``.
        """

    def apply_diff(self, layer_id: str, parent: str, stream: Readable) -> int:
        """Apply a tar stream to the tree, read it to its end, and return the size of the layer in bytes.

        Args:
            layer_id: the tree, as :meth:`ProtoDriver.create` left it; not one with children.
            parent: the parent it was created with.
            stream: the archive, uncompressed. Owners in it are the container's.

        Raises:
            ArchiveError: the archive is damaged or hostile. The tree is half filled then: remove it.
            LayerNotFoundError: there is no ``layer_id``.
        """

    def diff_size(self, layer_id: str, parent: str = "") -> int:
        """The bytes that the changes since ``parent`` hold: file lengths, each file once, not disk blocks.

        Raises:
            LayerNotFoundError: there is no ``layer_id`` or no ``parent``.
        """


class Driver(ProtoDriver, DiffDriver, Protocol):
    """A complete driver: what the registry gives, and what a layer store works with."""


class FileGetCloser(Protocol):
    """Gives the contents of single files of a tree, for putting a recorded tar stream together again."""

    def get(self, name: bytes) -> BinaryIO:
        """The contents of the regular file ``name``, a path from the tree's root with or without leading slash.

        Symbolic links in the path lead to places in the tree only.

        Raises:
            OSError: there is no such file.
        """

    def close(self) -> None:
        """Release the tree; streams that were got may still be read on. Closing twice is harmless."""


@runtime_checkable
class DiffGetterDriver(Protocol):
    """A driver that can give file contents without mounting. For others: :func:`unionfs.drivers.files.file_getter`."""

    def diff_getter(self, layer_id: str) -> FileGetCloser:
        """Access to the files that the layer itself holds.

        Raises:
            LayerNotFoundError: there is none of this id.
        """


@runtime_checkable
class CapabilityDriver(Protocol):
    """A driver that has something to promise; the others promise nothing."""

    def capabilities(self) -> Capabilities:
        """The promises."""


@runtime_checkable
class ListingDriver(Protocol):
    """A driver that can tell what it holds, so that a store finds trees nobody knows of (contract row 115)."""

    def layer_ids(self) -> list[str]:
        """The ids of all trees, sorted."""


@runtime_checkable
class SyncingDriver(Protocol):
    """A driver that can bring a tree to stable storage, which a store asks before it records it (contract row 107)."""

    def sync(self, layer_id: str) -> None:
        """Return when everything written to the tree so far survives a loss of power.

        Raises:
            LayerNotFoundError: there is none of this id.
            OSError: the disk failed, possibly earlier on: what was written is not safe.
        """


class Checker(Protocol):
    """Tells whether a path is mounted, for counts that outlive a process (:mod:`unionfs.drivers.layered`)."""

    def is_mounted(self, path: str) -> bool:
        """Whether a usable file system is mounted at ``path``, an absolute path without links."""


LookFunc = Callable[[str, Sequence[str], IdMapping], Driver]
"""Makes a driver over a home that is there, to be looked at only; takes what an :data:`InitFunc` does.

Another process may use the home at the same time, and its file system may be read-only: nothing is made, cleaned up or
put right. The driver need only tell what there is, its differences and its files; nobody asks more of it.
"""

InitFunc = Callable[[str, Sequence[str], IdMapping], Driver]
"""Makes a driver: from its home directory, its ``key=value`` options, and the owners' mapping (remapped root).

Creates the home. Raises :class:`unionfs.errors.NotSupportedError`, or one of its kinds, when the driver cannot work
here, and :class:`unionfs.errors.OptionError` for an option it does not know.
"""


def capabilities_of(driver: Driver) -> Capabilities:
    """What ``driver`` promises; nothing when it does not say."""
    return driver.capabilities() if isinstance(driver, CapabilityDriver) else Capabilities()


# Ids

REMOVING = "-removing"
"""Ends the name of a directory that is being deleted, and is deleted on when a driver finds it at start-up."""

CREATING = "-creating"
"""Ends the name of a directory that is not complete yet, and is deleted when a driver finds it at start-up."""

# ``l`` and the block device are overlay2's; ``tmp`` and ``dir`` are kept for layouts with room for more.
_RESERVED = frozenset({".", "..", "l", "tmp", "dir", "backingFsBlockDev"})

# NAME_MAX is 255, and a name grows by a random part and one of the endings above.
_MAX_BYTES = 220


def is_layer_id(name: str) -> bool:
    """Whether ``name`` may be a layer's."""
    return fault_of(name) is None


def check_layer_id(layer_id: str, doing: str) -> None:
    """Raise :class:`DriverError` unless ``layer_id`` may be a layer's; ``doing`` is the verb for the message."""
    fault = fault_of(layer_id)
    if fault is not None:
        raise DriverError(
            f"cannot {doing} layer {layer_id!r}: the id {fault}; use a name such as 64 hexadecimal digits"
        )


def fault_of(layer_id: str) -> str | None:
    """What is wrong with ``layer_id``, or None."""
    if not layer_id:
        return "is empty"
    if "/" in layer_id or "\0" in layer_id:
        return "has a slash or a NUL in it"
    if layer_id in _RESERVED or layer_id.endswith((REMOVING, CREATING)):
        return "is one that the driver uses itself"
    if len(layer_id.encode("utf-8", "surrogateescape")) > _MAX_BYTES:
        return f"is longer than {_MAX_BYTES} bytes"
    return None
