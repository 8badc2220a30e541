"""The merged tree as it is: names, attributes and contents, read from the upper directory and the lower stack."""

from __future__ import annotations

import errno
import os
import stat
import sys
from collections.abc import Callable
from typing import Final

from unionfs.fuse_ops.options import MountOptions
from unionfs.fuse_ops.stack.layer_dir import DescriptorCache, LayerDir
from unionfs.fuse_ops.stack.lower_stack import LowerDir, LowerHit, LowerStack, scan
from unionfs.fuse_ops.stack.upper_dir import UpperDir
from unionfs.fuse_ops.tree.attributes import Attributes, Ownership
from unionfs.fuse_ops.tree.inodes import ROOT_INO, DirInode, FileInode, Inode, InodeNumbers, InodeTable, as_directory
from unionfs.host.files import make_accessible, open_confined
from unionfs.host.syscalls import open_handle
from unionfs.overlay import rules
from unionfs.overlay.format import MARK, NAME_MAX, WHITEOUT_DEVICE, OverlayXattrs, decode_origin, inode_in_handle
from unionfs.overlay.rules import WHITEOUT, DirMarks

_DIR_FLAGS = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NO_DATA: Final = "the data of this metacopy is missing"


def enoent(name: bytes) -> FileNotFoundError:
    return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), os.fsdecode(name))


class MergedView:
    """Reading side of the tree: finds objects, says where they are, lists directories.

    Of one name: :meth:`lookup` gives the inode or raises ENOENT, :meth:`find` the inode or None, :meth:`find_with_stat`
    also lstat(2) if it was asked for, and :meth:`child` also the attributes to show. :meth:`upper_state` and
    :meth:`lower_hit` say what the upper directory, or the lower layers alone, have under it.

    All methods raise :class:`OSError` with the errno that a program should see.
    """

    def __init__(
        self,
        lower: LowerStack,
        upper: UpperDir | None,
        cache: DescriptorCache,
        options: MountOptions,
        xattrs: OverlayXattrs,
    ) -> None:
        self.lower = lower
        self.upper = upper
        self.options = options
        self.xattrs = xattrs
        self.ownership = Ownership(options)
        self._cache = cache
        self._can_open_handles = True
        # Whether a file that has blocks for all its data has the data. After a crash it may have them for nothing.
        self.trusts_blocks = True
        # With the writeback cache the kernel does not take modification times from us: it sends those it wants.
        self.kernel_keeps_time = options.writeback
        layers: list[LayerDir] = [*([upper.layer] if upper else []), *lower.layers, *lower.data_layers]
        numbers = InodeNumbers((layer.device for layer in layers), options.xino)
        self.inodes = InodeTable(numbers)
        self.found_links: set[FileInode] = set()  # with names that were found since they were copied up
        self.root = self._make_root()

    def _make_root(self) -> DirInode:
        root = self.inodes.new_directory(ROOT_INO)
        root.lowers = self.lower.root
        root.stack_path = b""
        if self.upper is not None:
            root.upper = True
            if rules.is_marked_opaque(self.upper.layer.fd):
                root.lowers = ()
            marks = self.lower.read_marks(self.upper.layer.proc_path(b""))
            self._take_marks(root, marks)
        return root

    @staticmethod
    def _take_marks(directory: DirInode, marks: DirMarks) -> None:
        directory.impure, directory.xwhiteouts = marks.impure, marks.xwhiteouts
        directory.holds_nested_whiteouts = marks.nested

    # -- where things are -------------------------------------------------------------------------------------

    def upper_dir_fd(self, directory: DirInode) -> int:
        """An O_PATH descriptor of the upper directory of ``directory``; owned by the cache, use it at once."""
        assert self.upper is not None
        if directory.ino == ROOT_INO:
            return self.upper.layer.fd
        if directory.orphan:
            raise enoent(directory.name)
        fd = self._cache.get(directory)
        if fd is not None:
            return fd
        # From the nearest one above that is open, in one step: there may be more on the way than descriptors.
        names = [directory.name]
        above = directory.parent
        start: int | None = None
        while above is not None and start is None:
            start = self.upper.layer.fd if above.ino == ROOT_INO else self._cache.get(above)
            if start is None:
                names.append(above.name)
                above = above.parent
        if start is None:
            raise enoent(directory.name)  # it, or one above, was removed
        names.reverse()
        return self._cache.put(directory, open_confined(start, b"/".join(names), _DIR_FLAGS))

    def forget_upper_dir(self, directory: DirInode) -> None:
        """Close the cached descriptor of a directory that goes away or is replaced."""
        self._cache.discard(directory)

    def upper_at(self, inode: Inode) -> tuple[int, bytes]:
        """Descriptor and name of the upper object of ``inode``, for ``*at`` calls. Not for orphans."""
        assert self.upper is not None
        if inode.ino == ROOT_INO:
            return self.upper.layer.fd, b"."
        if isinstance(inode, FileInode) and inode.staged_link is not None:
            return self.upper.work_fd, inode.staged_link
        if inode.parent is None:
            raise enoent(inode.name)
        return self.upper_dir_fd(inode.parent), inode.name

    def real_at(self, inode: Inode) -> tuple[int, bytes]:
        """Descriptor and name of the object that ``inode`` is at present, in whichever layer. Not for upper orphans."""
        if inode.upper:
            return self.upper_at(inode)
        layer, path = self.lower_place(inode)
        return layer.locate(path)

    @staticmethod
    def lower_place(inode: Inode) -> tuple[LayerDir, bytes]:
        """The topmost lower object of ``inode``: layer and path. Not for a file that was copied up."""
        if isinstance(inode, DirInode):
            entry = inode.lowers[0]
            return entry.layer, entry.path
        assert isinstance(inode, FileInode)
        assert inode.lower is not None
        return inode.lower

    def proc_path(self, inode: Inode) -> tuple[bytes, bool]:
        """A path to the real object for calls that take no descriptor, and whether its last component is followed."""
        if inode.orphan_fd >= 0:
            return b"/proc/self/fd/%d" % inode.orphan_fd, True
        return b"/proc/self/fd/%d/%s" % self.real_at(inode), False

    def real_stat(self, inode: Inode) -> os.stat_result:
        """lstat(2) of the real object."""
        if inode.orphan_fd >= 0:
            return os.stat(inode.orphan_fd)
        dir_fd, name = self.real_at(inode)
        return os.stat(name, dir_fd=dir_fd, follow_symlinks=False)

    # -- lookup -----------------------------------------------------------------------------------------------

    def lookup(self, directory: Inode, name: bytes) -> Inode:
        """The object called ``name`` in ``directory``; FileNotFoundError if the merged tree has none."""
        inode = self.find(directory, name)
        if inode is None:
            raise enoent(name)
        return inode

    def find(self, directory: Inode, name: bytes) -> Inode | None:
        """As :meth:`lookup`, None instead of an exception. No caller holds a cached descriptor across this."""
        found = self.find_with_stat(directory, name)
        return None if found is None else found[0]

    def find_with_stat(self, directory: Inode, name: bytes) -> tuple[Inode, os.stat_result | None] | None:
        """As :meth:`find`; beside the inode lstat(2) of its real object, if that had to be asked for just now."""
        self._cache.trim()
        directory = as_directory(directory)
        if directory.children is not None:
            child = directory.children.get(name)
            if child is not None:
                return child, None
        if len(name) > NAME_MAX:
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG), os.fsdecode(name))
        if rules.is_mark(name) or directory.orphan:
            return None
        hides_lower = False
        if directory.upper:
            st, hides_lower = self.upper_state(directory, name)
            if st is not None:
                if stat.S_ISDIR(st.st_mode):
                    return self._adopt_upper_dir(directory, name, st, merge=not hides_lower), st
                return self._adopt_upper_file(directory, name, st), st
        if hides_lower or not directory.lowers:
            return None
        hit = self.lower_hit(directory, name)
        if hit is None:
            return None
        inode = self._adopt_lower(directory, name, hit)
        # A further name of a file that was copied up under another one: what was found is not what it is now.
        return inode, None if inode.upper else hit.st

    def upper_state(self, directory: DirInode, name: bytes) -> tuple[os.stat_result | None, bool]:
        """What the upper layer says of ``name``: lstat of an object (None without one), and whether it hides lowers."""
        dir_fd = self.upper_dir_fd(directory)
        st = rules.stat_entry(dir_fd, name, self.lower.spaces, xwhiteouts=directory.xwhiteouts)
        if st is None:
            return None, bool(directory.lowers) and self._is_marked(directory, name)
        if st is WHITEOUT:
            return None, True
        if not stat.S_ISDIR(st.st_mode):
            return st, True
        return st, bool(directory.lowers) and self._is_marked(directory, name)

    def _is_marked(self, directory: DirInode, name: bytes) -> bool:
        """Whether a ``.wh.`` mark in the upper directory hides ``name``."""
        try:
            return name in self.upper_marks(directory)
        except PermissionError:  # a directory that a server without privilege may search, but not read
            return rules.has_mark(self.upper_dir_fd(directory), name)

    def upper_marks(self, directory: DirInode) -> set[bytes]:
        """The names that ``.wh.`` marks in the upper directory hide. Reads that directory once."""
        marks = directory.marks
        if marks is None:
            marks = set()
            with scan(self.upper_dir_fd(directory)) as items:
                for item in items:
                    if rules.is_mark(item.name):
                        marks.add(item.name[len(MARK) :])
            directory.marks = marks
        return marks

    def lower_hit(self, directory: DirInode, name: bytes) -> LowerHit | None:
        """What the lower layers alone show as ``name`` in ``directory``."""
        lowers = directory.lowers
        if not lowers:
            return None
        if len(lowers) == 1:
            return self.lower.lookup(lowers, name)
        if directory.index is None:
            try:
                directory.index = self.lower.index(lowers)
            except PermissionError:  # as in _is_marked: one of them cannot be read
                return self.lower.lookup(lowers, name)
        return self.lower.lookup_indexed(lowers, directory.index, name)

    def _adopt_lower(self, directory: DirInode, name: bytes, hit: LowerHit) -> Inode:
        st = hit.st
        real = (st.st_dev, st.st_ino)
        if stat.S_ISDIR(st.st_mode):
            below = self.inodes.new_directory(self.inodes.numbers.of(real))
            below.lowers = hit.dirs
            below.stack_path = self._stack_join(directory, name)
            below.add_place(directory, name)
            return below
        if st.st_nlink > 1:
            known = self.inodes.linked(real)
            if known is not None:
                known.add_place(directory, name)
                if known.staged_link is not None:
                    if known.unplaced is None:
                        known.unplaced = set()
                    known.unplaced.add((directory, name))
                    self.found_links.add(known)
                return known
        inode = self.inodes.new_file(stat.S_IFMT(st.st_mode), self.inodes.numbers.of(real))
        inode.lower = (hit.layer, hit.path)
        if not self._may_be_metacopy(st):
            pass
        elif self.lower.is_last(hit.layer):
            # Data of a metacopy would be missing here, which is told to whoever opens it: most files are just listed.
            inode.data_unproven = True
        else:
            path = hit.layer.proc_path(hit.path)
            if self.lower.is_metacopy(path):
                inode.metacopy = True
                rest = self.lower.below(directory.lowers, hit.position)
                root = self.lower.root_below(hit.layer)
                inode.data = self.lower.data_below(path, rest, hit.path.rpartition(b"/")[2], root)
        if any(entry.nested for entry in directory.lowers):
            self._show_nested_whiteout(inode, hit.layer.proc_path(hit.path), st)
        if st.st_nlink > 1:
            self.inodes.remember_links(inode, real)
        inode.add_place(directory, name)
        return inode

    def _show_nested_whiteout(self, inode: FileInode, path: bytes, st: os.stat_result) -> None:
        if rules.is_nested_whiteout(path, st, self.lower.spaces):
            inode.is_nested_whiteout = True
            inode.kind = stat.S_IFCHR

    def _adopt_upper_dir(self, directory: DirInode, name: bytes, st: os.stat_result, *, merge: bool) -> DirInode:
        path = rules.entry_path(self.upper_dir_fd(directory), name)
        marks = self.lower.read_marks(path)
        lowers: tuple[LowerDir, ...] = ()
        stack_path = None
        redirect = marks.redirect
        if marks.opaque:
            pass
        elif redirect is not None and (directory.lowers or self.lower.follows_redirects):
            redirect = rules.check_redirect(redirect)
            hit = self.lower.resolve_redirect(redirect, directory.lowers, self.root.lowers)
            lowers = hit.dirs if hit is not None else ()
            stack_path = redirect[1:] if redirect.startswith(b"/") else self._stack_join(directory, redirect)
        elif merge and directory.lowers:
            hit = self.lower_hit(directory, name)
            lowers = hit.dirs if hit is not None else ()
            stack_path = self._stack_join(directory, name)
        if lowers and rules.is_marked_opaque(self.upper_dir_fd(directory), name):
            lowers = ()
        real = (st.st_dev, st.st_ino)
        if lowers:
            # As in the kernel, a merged directory has the number of its topmost lower one: copy-up does not change it.
            below = lowers[0].layer.stat(lowers[0].path)
            real = (below.st_dev, below.st_ino)
        inode = self.inodes.new_directory(self.inodes.numbers.of(real))
        inode.upper = True
        inode.lowers = lowers
        inode.stack_path = stack_path
        inode.redirect = redirect
        inode.has_origin = bool(lowers)
        self._take_marks(inode, marks)
        inode.add_place(directory, name)
        return inode

    def _adopt_upper_file(self, directory: DirInode, name: bytes, st: os.stat_result) -> FileInode:
        real = (st.st_dev, st.st_ino)
        kind = stat.S_IFMT(st.st_mode)
        if st.st_nlink > 1:
            known = self.inodes.linked(real)
            if known is not None:
                known.add_place(directory, name)
                return known
        path = b"/proc/self/fd/%d/%s" % (self.upper_dir_fd(directory), name)
        origin = self._origin(path) if directory.impure else None
        inode = self.inodes.new_file(kind, self.inodes.numbers.of(origin or real))
        inode.upper = True
        inode.has_origin = origin is not None  # a directory that it comes to later has to be marked too
        if directory.holds_nested_whiteouts:
            self._show_nested_whiteout(inode, path, st)
        if self._may_be_metacopy(st) and self.lower.is_metacopy(path):
            inode.metacopy = True
            inode.data = self.lower.data_below(path, directory.lowers, name, self.root.lowers)
        if st.st_nlink > 1:
            self.inodes.remember_links(inode, real)
        inode.add_place(directory, name)
        return inode

    def adopt_new(self, directory: DirInode, name: bytes, st: os.stat_result) -> Inode:
        """The inode of an object just made in the upper layer."""
        ino = self.inodes.numbers.of((st.st_dev, st.st_ino))
        kind = stat.S_IFMT(st.st_mode)
        inode = self.inodes.new_directory(ino) if kind == stat.S_IFDIR else self.inodes.new_file(kind, ino)
        inode.upper = inode.kernel.has_no_xattrs = True
        inode.protection = 0
        inode.add_place(directory, name)
        return inode

    @staticmethod
    def _stack_join(directory: DirInode, name: bytes) -> bytes | None:
        if directory.stack_path is None:
            return None
        return directory.stack_path + b"/" + name if directory.stack_path else name

    def _may_be_metacopy(self, st: os.stat_result) -> bool:
        # A metacopy has a size but no data; a block or two may hold its attributes.
        if not stat.S_ISREG(st.st_mode) or st.st_size == 0:
            return False
        return st.st_blocks <= 16 or st.st_blocks * 512 < st.st_size or not self.trusts_blocks

    def _origin(self, path: bytes) -> tuple[int, int] | None:
        """Device and inode number of the lower file that an upper one was copied up from, if still there."""
        try:
            decoded = decode_origin(os.getxattr(path, self.xattrs.origin, follow_symlinks=False))
        except OSError:
            return None
        if decoded is None:
            return None
        handle, uuid = decoded
        for layer in self.lower.layers:
            if layer.filesystem_uuid != uuid:
                continue
            if self._can_open_handles:
                try:
                    fd = open_handle(layer.readable_fd, handle)
                except PermissionError:
                    self._can_open_handles = False
                except OSError:
                    return None
                else:
                    try:
                        st = os.stat(fd)
                    finally:
                        os.close(fd)
                    return st.st_dev, st.st_ino
            ino = inode_in_handle(handle)
            return None if ino is None else (layer.device, ino)
        return None

    # -- attributes -------------------------------------------------------------------------------------------

    def attributes(self, inode: Inode) -> Attributes:
        """What stat(2) shows of ``inode``."""
        return self.present(inode, self.real_stat(inode))

    def attributes_of_new(self, inode: Inode) -> Attributes:
        """As :meth:`attributes`, for the answer to the request that made ``inode``."""
        st, inode.kernel.creation_stat = inode.kernel.creation_stat, None
        return self.present(inode, self.real_stat(inode) if st is None else st)

    def child(self, directory: Inode, name: bytes) -> tuple[Inode, Attributes] | None:
        """The object called ``name`` in ``directory`` with its attributes; None if there is none."""
        found = self.find_with_stat(directory, name)
        if found is None:
            return None
        inode, st = found
        return inode, self.present(inode, self.real_stat(inode) if st is None else st)

    def present(self, inode: Inode, st: os.stat_result) -> Attributes:
        """The attributes to show for ``inode``, given those of its real object."""
        uid, gid, mode, rdev = st.st_uid, st.st_gid, st.st_mode, st.st_rdev
        if not self.ownership.plain:
            if self.ownership.overrides:
                path, _ = self.proc_path(inode)
                override = self.ownership.read_override(path, stat.S_IFMT(mode))
                if override is not None:
                    uid, gid = override.uid, override.gid
                    rdev = override.rdev
                    kind = stat.S_IFMT(override.mode)
                    if not kind or (kind == stat.S_IFDIR) != isinstance(inode, DirInode):
                        kind = stat.S_IFMT(mode)  # a directory is one, whatever an attribute says
                    mode = stat.S_IMODE(override.mode) | kind
                    inode.kind = kind
            uid, gid = self.ownership.to_mount_ids(uid, gid)
        blocks = st.st_blocks
        if isinstance(inode, DirInode):
            merged = len(inode.lowers) > 1 or (inode.upper and inode.lowers)
            nlink = 1 if merged or self.options.static_nlink else st.st_nlink
            if inode.orphan:
                nlink = 0
        else:
            assert isinstance(inode, FileInode)
            nlink = st.st_nlink if inode.nlink is None else inode.nlink
            if inode.is_nested_whiteout:
                mode, rdev = stat.S_IFCHR | stat.S_IMODE(mode), WHITEOUT_DEVICE
            if inode.parent is None and not inode.upper:
                nlink = inode.nlink or 0
            if inode.metacopy and inode.data is not None:
                blocks = inode.data[0].stat(inode.data[1]).st_blocks
            if not blocks and self.kernel_keeps_time and inode.kind == stat.S_IFREG and inode.handles is not None:
                # There may be data in the kernel's cache, and of no block tar(1) makes a file of zeros.
                blocks = int(any(file.writable for file in inode.handles))
        ino = inode.ino
        if ino == ROOT_INO:
            ino = self.inodes.numbers.of((st.st_dev, st.st_ino))
        return Attributes(
            ino,
            mode,
            nlink,
            uid,
            gid,
            rdev,
            st.st_size,
            blocks,
            st.st_blksize,
            st.st_atime_ns,
            st.st_mtime_ns,
            st.st_ctime_ns if inode.ctime is None else self.ctime_ns(inode, st),
        )

    @staticmethod
    def ctime_ns(inode: Inode, st: os.stat_result) -> int:
        """When somebody changed ``inode`` last, given lstat(2) of its real object."""
        kept = inode.ctime
        return kept[1] if kept is not None and kept[0] == st.st_ctime_ns else st.st_ctime_ns

    def unnoticed(self, inode: Inode, change: Callable[[], None]) -> None:
        """Do ``change`` to the upper object of ``inode``, which nobody asked for: the ctime shown stays what it was.

        It does so for as long as the disk has the ctime that the change left, and nobody is about to make another
        change, which may get the same time where the clock is coarse. See :meth:`CopyUp.ensure`.
        """
        shown_ns = self.ctime_ns(inode, self.real_stat(inode))
        change()
        self.keep_ctime(inode, shown_ns)

    def keep_ctime(self, inode: Inode, shown_ns: int) -> None:
        """Go on showing ``shown_ns`` as the ctime of ``inode``, whose upper object has just been changed."""
        try:
            inode.ctime = (self.real_stat(inode).st_ctime_ns, shown_ns)
        except OSError:  # the change has been made
            inode.ctime = None

    def data_source(self, inode: FileInode) -> tuple[LayerDir, bytes]:
        """The lower file that has the contents of ``inode``; EIO if they are missing, rather than zeros."""
        source = inode.data if inode.metacopy else inode.lower
        if source is None:
            raise OSError(errno.EIO, _NO_DATA, os.fsdecode(inode.path()))
        return source

    def open_data(self, inode: FileInode, flags: int = os.O_RDONLY) -> int:
        """Open the lower file that has the contents of ``inode``; raises as :meth:`data_source`."""
        layer, path = self.data_source(inode)
        fd = layer.open(path, flags)
        if inode.data_unproven:
            try:
                self._prove_data(inode, layer.proc_path(path) if flags & os.O_PATH else fd)
            except BaseException:
                os.close(fd)
                raise
        return fd

    def _prove_data(self, inode: FileInode, what: int | bytes) -> None:
        if self.lower.is_metacopy(what):
            raise OSError(errno.EIO, _NO_DATA, os.fsdecode(inode.path()))
        inode.data_unproven = False

    def readlink(self, inode: Inode) -> bytes:
        """The target of a symbolic link."""
        if inode.orphan_fd >= 0:
            return os.fsencode(os.readlink(b"", dir_fd=inode.orphan_fd))
        dir_fd, name = self.real_at(inode)
        return os.fsencode(os.readlink(name, dir_fd=dir_fd))

    # -- listing ----------------------------------------------------------------------------------------------

    def names(self, directory: Inode, limit: int = sys.maxsize) -> list[bytes]:
        """The names in ``directory``, each once, without ``.`` and ``..``; at most ``limit`` of them."""
        found: list[bytes] = []
        directory = as_directory(directory)
        if directory.orphan:
            return found
        hidden: set[bytes] = set()
        if directory.upper:
            if directory.lowers:
                hidden |= self.upper_marks(directory)
            dir_fd = self.upper_dir_fd(directory)
            with scan(dir_fd) as items:
                for item in items:
                    name = item.name
                    if rules.is_mark(name):
                        continue
                    if directory.lowers:
                        hidden.add(name)
                    # Also where nothing lies below: a whiteout can outlive what it hid.
                    if not rules.is_whiteout_entry(dir_fd, item, self.lower.spaces, directory.xwhiteouts):
                        found.append(name)
                        if len(found) == limit:
                            return found
        for name in self._lower_names(directory):
            if name not in hidden:
                found.append(name)
                if len(found) == limit:
                    break
        return found

    def _lower_names(self, directory: DirInode) -> list[bytes]:
        lowers = directory.lowers
        if not lowers:
            return []
        if directory.index is not None:
            return list(directory.index.names)
        index = self.lower.index(lowers)
        if len(lowers) > 1:  # of a single directory, lookups ask the disk: there is nothing to merge
            directory.index = index
        return list(index.names)

    def is_empty(self, directory: Inode) -> bool:
        """Whether there is nothing in ``directory``, also in one of the server's own that it may not look into."""
        try:
            return not self.names(directory, limit=1)
        except PermissionError:
            if not directory.upper:
                raise
        dir_fd, name = self.upper_at(directory)
        mode = stat.S_IMODE(os.stat(name, dir_fd=dir_fd, follow_symlinks=False).st_mode)
        make_accessible(dir_fd, name)
        try:
            return not self.names(directory, limit=1)
        finally:
            os.chmod(name, mode, dir_fd=dir_fd)
