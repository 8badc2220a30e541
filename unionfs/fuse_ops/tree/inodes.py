"""The objects of the merged tree that the kernel knows about, the numbers it knows them by, and who has them open.

An :class:`Inode` lives as long as something needs it: the kernel (until it forgets the number), an open file, or a
child (whose path runs through it). Memory is therefore bounded by what the kernel remembers.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from typing import Final

from unionfs.fuse_ops.stack.layer_dir import LayerDir
from unionfs.fuse_ops.stack.lower_stack import DirIndex, LowerDir

ROOT_INO: Final = 1  # FUSE_ROOT_ID
UNKNOWN_INO: Final = 0xFFFF_FFFF
"""The number of a name that is listed without attributes, as libfuse has it; no inode is given it."""
_DEVICE_SHIFT: Final = 56
_MAX_POSITION: Final = 0x7F
_SHORT: Final = 1 << 31
_SHORT_SHIFT: Final = 26  # 64 million files: the default of ext4 for one TiB
_VIRTUAL_POSITION: Final = 0x1F
_FIRST_VIRTUAL: Final = _SHORT | _VIRTUAL_POSITION << _SHORT_SHIFT
_FURTHER_VIRTUAL: Final = 1 << 63

RealFile = tuple[int, int]  # st_dev and st_ino of a file in a layer


class KernelView:
    """What a transport remembers of an object that the kernel knows: what it was told, and what that spares us."""

    __slots__ = ("creation_stat", "default_acl", "has_no_xattrs", "may_be_mapped", "packed", "page_cache_primed")

    def __init__(self) -> None:
        self.packed: bytes | None = None  # attributes as they were told, while no layer changes them
        self.creation_stat: os.stat_result | None = None  # lstat from when it was made, until whoever did has an answer
        self.has_no_xattrs = False  # made in this mount, and no attribute was given to it: it has no capabilities
        self.page_cache_primed = False  # the kernel has been given the contents, and has not asked for them since
        # It may be mapped for writing, of which the kernel tells us nothing: what is stored changes times and blocks.
        self.may_be_mapped = False
        # Of a directory: whether what is made in it gets its access from there; None: not asked.
        self.default_acl: bool | None = None


class Inode:
    """An object of the merged tree: a :class:`DirInode` or a :class:`FileInode`.

    ``parent`` and ``name`` say where it is now. One without any place left is an orphan: unlinked, but still open or
    remembered.
    """

    __slots__ = (
        "__weakref__",
        "ctime",
        "has_origin",
        "ino",
        "kernel",
        "kind",
        "lookups",
        "name",
        "orphan_fd",
        "parent",
        "protection",
        "upper",
    )

    def __init__(self, ino: int, kind: int) -> None:
        self.ino = ino
        self.kind = kind  # stat.S_IFMT of the mode
        self.lookups = 0  # references that the kernel holds
        self.kernel = KernelView()
        self.parent: DirInode | None = None
        self.name = b""
        self.upper = False  # there is an object in the upper layer
        self.orphan_fd = -1  # O_PATH descriptor of an unlinked upper object
        self.has_origin = False  # the upper object records the lower one that it was copied from
        self.protection: int | None = None  # flags that forbid changes; see Protection. None: not asked
        # The ctime on disk after a change of ours that nobody asked for, and the one to show in its place.
        self.ctime: tuple[int, int] | None = None

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.ino:#x} {os.fsdecode(self.path())}>"

    @property
    def needed(self) -> bool:
        """Whether somebody may still ask for it."""
        return self.lookups > 0

    @property
    def orphan(self) -> bool:
        return self.parent is None and self.ino != ROOT_INO

    def path(self) -> bytes:
        """The path in the merged tree, for messages."""
        parts: list[bytes] = []
        node: Inode | None = self
        while node is not None and node.parent is not None:
            parts.append(node.name)
            node = node.parent
        return b"/" + b"/".join(reversed(parts))

    def places(self) -> list[tuple[DirInode, bytes]]:
        """Every known (directory, name) of this object."""
        return [] if self.parent is None else [(self.parent, self.name)]

    def add_place(self, parent: DirInode, name: bytes) -> None:
        """Record that ``name`` in ``parent`` is this object."""
        if self.parent is None:
            self.parent, self.name = parent, name
        if parent.children is None:
            parent.children = {}
        parent.children[name] = self

    def remove_place(self, parent: DirInode, name: bytes) -> None:
        """Record that ``name`` in ``parent`` is no longer this object."""
        if parent.children is not None and parent.children.get(name) is self:
            del parent.children[name]
        if self.parent is parent and self.name == name:
            self.parent, self.name = None, b""

    def is_placed(self, parent: DirInode, name: bytes) -> bool:
        """Whether the upper directory of ``parent`` has ``name``, which is this object's."""
        return self.upper


class DirInode(Inode):
    """A directory of the merged tree: an upper one, lower ones, or both."""

    __slots__ = (
        "children",
        "holds_nested_whiteouts",
        "impure",
        "index",
        "lowers",
        "marks",
        "origin_names",
        "redirect",
        "stack_path",
        "xwhiteouts",
    )

    def __init__(self, ino: int) -> None:
        super().__init__(ino, stat.S_IFDIR)
        self.lowers: tuple[LowerDir, ...] = ()
        self.stack_path: bytes | None = None  # where the lower layers have it
        self.children: dict[bytes, Inode] | None = None  # those that are in memory
        self.index: DirIndex | None = None  # the names in ``lowers``, once needed
        # Of the upper directory:
        self.redirect: bytes | None = None  # the value of its redirect attribute
        self.marks: set[bytes] | None = None  # names with a ``.wh.`` mark, once needed
        self.origin_names: set[bytes] | None = None  # what is in it and has an origin, once needed
        self.impure = False  # it may hold files that came from elsewhere (overlay.origin)
        self.xwhiteouts = False  # it may hold xattr whiteouts
        self.holds_nested_whiteouts = False  # it may hold whiteouts of an overlay stacked on this mount

    @property
    def needed(self) -> bool:
        return self.lookups > 0 or bool(self.children)


class FileInode(Inode):
    """Anything but a directory. A hard-linked file has further places in ``aliases``."""

    __slots__ = (
        "aliases",
        "capability",
        "data",
        "data_unproven",
        "handles",
        "is_nested_whiteout",
        "key",
        "lower",
        "metacopy",
        "nlink",
        "staged_link",
        "unplaced",
        "unsynced",
    )

    def __init__(self, ino: int, kind: int) -> None:
        super().__init__(ino, kind)
        self.handles: list[OpenFile] | None = None
        self.lower: tuple[LayerDir, bytes] | None = None  # the lower file, until it is copied up
        self.metacopy = False  # the object has metadata only
        self.data: tuple[LayerDir, bytes] | None = None  # the lower file with its data; None if that is missing
        self.data_unproven = False  # it may be a metacopy in the lowest layer, which nobody has asked the disk yet
        self.unsynced = False  # the upper file is marked, since its data may not be on the disk; see Unsynced
        # File capabilities that were given to it while somebody may write: our own writes take them away, which is for
        # the kernel to do, since data can come from its cache long after it was written.
        self.capability: bytes | None = None
        # A file with an attribute on disk, shown as the device 0:0 that an overlay stacked on this mount has made.
        self.is_nested_whiteout = False
        # Hard links:
        self.aliases: set[tuple[DirInode, bytes]] | None = None
        self.nlink: int | None = None  # link count kept by us, because no layer has all the names
        self.key: RealFile | None = None  # under which they find this inode
        self.staged_link: bytes | None = None  # the name in the work directory of a copied-up file
        # Names of such a file that were looked up since, and are no links of the upper one as long as nothing changes.
        self.unplaced: set[tuple[DirInode, bytes]] | None = None

    @property
    def needed(self) -> bool:
        return self.lookups > 0 or bool(self.handles)

    def may_have_other_names(self, st: os.stat_result) -> bool:
        """Whether the lower layers may have names of this file, which has ``st`` there, that nobody looked up."""
        return st.st_nlink > 1 and self.nlink != 0

    def places(self) -> list[tuple[DirInode, bytes]]:
        """Every known (directory, name) of this file."""
        places = super().places()
        return [*places, *self.aliases] if self.aliases else places

    def add_place(self, parent: DirInode, name: bytes) -> None:
        """Record that ``name`` in ``parent`` is this file, perhaps besides other names."""
        if self.parent is not None and (self.parent is not parent or self.name != name):
            if self.aliases is None:
                self.aliases = set()
            self.aliases.add((parent, name))
        super().add_place(parent, name)

    def remove_place(self, parent: DirInode, name: bytes) -> None:
        """Record that ``name`` in ``parent`` is no longer this file."""
        if self.unplaced:
            self.unplaced.discard((parent, name))
        if self.aliases:
            self.aliases.discard((parent, name))
        super().remove_place(parent, name)
        if self.parent is None and self.aliases:
            self.parent, self.name = self.aliases.pop()
        if not self.aliases:
            self.aliases = None

    def is_placed(self, parent: DirInode, name: bytes) -> bool:
        """Whether the upper directory of ``parent`` has ``name``, which is one of this file's."""
        return self.upper and (self.unplaced is None or (parent, name) not in self.unplaced)


def as_directory(inode: Inode) -> DirInode:
    """``inode``, of whom a directory was expected; raises ENOTDIR for anything else."""
    if not isinstance(inode, DirInode):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), os.fsdecode(inode.path()))
    return inode


def as_file(inode: Inode) -> FileInode:
    """``inode``, of whom anything but a directory was expected; raises EISDIR for one."""
    if not isinstance(inode, FileInode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fsdecode(inode.path()))
    return inode


# What the kernel has already done, or does itself, when it sends an open: it resolved and created the name, serialises
# appends (and with its writeback cache sends them at their offset), and aligns direct I/O as it likes.
_KERNELS_BUSINESS = (
    os.O_CREAT
    | os.O_EXCL
    | os.O_TRUNC
    | os.O_APPEND
    | os.O_DIRECT
    | os.O_SYNC
    | os.O_DSYNC
    | os.O_NOCTTY
    | os.O_NOATIME
)


def backing_flags(flags: int) -> int:
    """The flags to open the real file with, for a client's ``flags``."""
    result = (flags & ~_KERNELS_BUSINESS & ~os.O_ACCMODE) | os.O_NOFOLLOW | os.O_CLOEXEC
    # The kernel's writeback cache fills pages by reading through descriptors that are open for writing only.
    return result | (os.O_RDONLY if flags & os.O_ACCMODE == os.O_RDONLY else os.O_RDWR)


class OpenFile:
    """A client's open file. ``fd`` stays the same number for its life; copy-up puts another file behind it.

    With ``open_lazily`` in the place of a descriptor, there is none until it is needed: what the kernel has in its page
    cache is never read from us. ``synced_size``: how large the file was at its last sync if that was short, else 0.
    """

    __slots__ = ("_fd", "_open_lazily", "appends", "inode", "synced_size", "writable")

    def __init__(
        self, inode: FileInode, fd: int, *, writable: bool, open_lazily: Callable[[FileInode], int] | None = None
    ) -> None:
        self.inode = inode
        self._fd = fd
        self.writable = writable
        self._open_lazily = open_lazily
        self.synced_size = 0
        self.appends = False  # nothing but that, since the file was append-only when it was opened
        if inode.handles is None:
            inode.handles = []
        inode.handles.append(self)

    @property
    def fd(self) -> int:
        """The descriptor of the real file; raises OSError where it is opened now and cannot be."""
        if self._fd < 0:
            assert self._open_lazily is not None
            self._fd = self._open_lazily(self.inode)
        return self._fd

    @property
    def has_fd(self) -> bool:
        return self._fd >= 0

    def switch(self, fd: int) -> None:
        """Put the file behind ``fd`` behind this one, atomically for a read going on in a thread."""
        os.dup2(fd, self.fd, inheritable=False)

    def close(self) -> None:
        assert self.inode.handles is not None
        self.inode.handles.remove(self)
        if not self.inode.handles:
            self.inode.handles = None
        if self._fd >= 0:
            os.close(self._fd)


class OpenDir:
    """A client's open directory: the names as they were at the last rewind, so that offsets stay what they are."""

    __slots__ = ("inode", "names")

    def __init__(self, inode: DirInode) -> None:
        self.inode = inode
        self.names: list[bytes] | None = None


class InodeNumbers:
    """Numbers for inodes: those of the layers' file systems, told apart when there are several (kernel: ``xino``).

    Files of the first device keep their number. What those of others get survives a remount with the same layers:

    - ``auto``: one with the highest of 32 bits set, the position of its device in the five below, and its own number
      in the others, so that programs of 32 bits can use it; where that does not fit, as with ``on``.
    - ``on``: the position of the device in the highest of 64 bits, as the kernel has it.
    - ``off``: one that is only valid while mounted, as where neither fits. It has 32 bits too.

    A number that another file in memory has is replaced by one of the last kind (:class:`InodeTable`).
    """

    def __init__(self, devices: Iterator[int], xino: str = "auto") -> None:
        self._xino = xino
        self._device_ids: dict[int, int] = {}
        for device in devices:
            self._device_ids.setdefault(device, len(self._device_ids))
        self._next_virtual = _FIRST_VIRTUAL

    def of(self, real: RealFile) -> int:
        """The number that the file with this device and inode number should have."""
        device, ino = real
        position = self._device_ids.setdefault(device, len(self._device_ids))
        if ino <= ROOT_INO or ino == UNKNOWN_INO:
            return self.virtual()
        if position == 0:
            return self.virtual() if ino >> _DEVICE_SHIFT else ino
        if self._xino == "auto" and position < _VIRTUAL_POSITION and ino < 1 << _SHORT_SHIFT:
            return _SHORT | position << _SHORT_SHIFT | ino
        if self._xino == "off" or ino >> _DEVICE_SHIFT or position > _MAX_POSITION:
            return self.virtual()
        return position << _DEVICE_SHIFT | ino

    def virtual(self) -> int:
        """A number that was not given before. In theory a file of the first device can have it."""
        number = self._next_virtual
        self._next_virtual = number + 1 if number + 1 != UNKNOWN_INO else _FURTHER_VIRTUAL
        return number


class InodeTable:
    """All inodes in memory, by number, and hard-linked ones by the file they are on disk."""

    def __init__(self, numbers: InodeNumbers) -> None:
        self.numbers = numbers
        # Closes what may be the last descriptor of a file without a name, and waits until all are closed: a server has
        # a thread for that.
        self.close_last: Callable[[int], None] = os.close
        self.end_closing: Callable[[], None] = lambda: None
        self._by_ino: dict[int, Inode] = {}
        self._by_file: dict[RealFile, FileInode] = {}

    def __len__(self) -> int:
        return len(self._by_ino)

    def __getitem__(self, ino: int) -> Inode:
        return self._by_ino[ino]

    def __iter__(self) -> Iterator[Inode]:
        return iter(list(self._by_ino.values()))

    def new_directory(self, ino: int) -> DirInode:
        """A new directory with the number ``ino``, or a virtual one if that is taken."""
        directory = DirInode(self._free(ino))
        self._by_ino[directory.ino] = directory
        return directory

    def new_file(self, kind: int, ino: int) -> FileInode:
        """A new file of the ``kind`` (stat.S_IFMT) with the number ``ino``, or a virtual one if that is taken."""
        file = FileInode(self._free(ino), kind)
        self._by_ino[file.ino] = file
        return file

    def _free(self, ino: int) -> int:
        while ino in self._by_ino:
            ino = self.numbers.virtual()
        return ino

    def linked(self, real: RealFile) -> FileInode | None:
        """The inode in memory of a file that has several names."""
        return self._by_file.get(real)

    def remember_links(self, inode: FileInode, real: RealFile) -> None:
        """Let further names of the file ``real`` find ``inode``."""
        inode.key = real
        self._by_file[real] = inode

    def forget_links(self, inode: FileInode) -> None:
        """Let further names of the file that ``inode`` was find another one."""
        if inode.key is not None and self._by_file.get(inode.key) is inode:
            del self._by_file[inode.key]
        inode.key = None

    def drop_if_unneeded(self, inode: Inode) -> None:
        """Forget ``inode``, and the directories that were only kept for it."""
        node: Inode | None = inode
        while node is not None and not node.needed and node.ino != ROOT_INO and node.ino in self._by_ino:
            parent = node.parent
            if isinstance(node, FileInode):
                if node.staged_link is not None or node.nlink:
                    return  # names of it that were not looked up yet must still find it
                for other, name in list(node.aliases or ()):
                    node.remove_place(other, name)
                    self.drop_if_unneeded(other)
                self.forget_links(node)
            if parent is not None and parent.children is not None and parent.children.get(node.name) is node:
                del parent.children[node.name]
            del self._by_ino[node.ino]
            if node.orphan_fd >= 0:
                self.close_last(node.orphan_fd)
                node.orphan_fd = -1
            node = parent
