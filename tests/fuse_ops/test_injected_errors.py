"""Each system call of each request that changes something fails, one after the other: the tree stays whole.

Without a mount: at the level of requests, which both transports go through.
"""

from __future__ import annotations

import errno
import functools
import os
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pytest

from tests.support import faults
from tests.support.faults import Faults
from tests.support.syscalls import MNT_DETACH, mount, umount2
from tests.support.trees import ROOT, Caller, options_in
from unionfs.errors import LayerError
from unionfs.fuse_ops.options import MountOptions
from unionfs.fuse_ops.requests.job import Job, done_here
from unionfs.fuse_ops.requests.union_requests import UnionRequests
from unionfs.fuse_ops.session.assembly import open_tree
from unionfs.fuse_ops.stack import workdir
from unionfs.fuse_ops.stack.upper_dir import UpperDir
from unionfs.fuse_ops.tree.inodes import DirInode, FileInode, Inode, OpenFile, as_directory, as_file
from unionfs.fuse_ops.union.metadata import AttributeChange
from unionfs.fuse_ops.union.union_tree import UnionTree
from unionfs.host.files import remove_tree
from unionfs.host.syscalls import RENAME_EXCHANGE, RENAME_NOREPLACE, RENAME_WHITEOUT

if os.geteuid() != 0:
    pytest.skip("needs root for trusted attributes and owners", allow_module_level=True)

ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EMFILE, errno.EACCES)
LASTING = (errno.ENOSPC, errno.EMFILE)
THOROUGH = os.environ.get("HYPOTHESIS_PROFILE") == "long"
ASKING = ("stat", "fstat", "getxattr", "listxattr")
# A redirect that cannot be recorded: the program is to copy then, as it does between file systems.
EXDEV_FOR = {errno.ENOSPC: errno.EXDEV}
FS_IOC_SETFLAGS = 0x40086602
FS_IMMUTABLE_FL = 0x10
LONG_AGO = 1_500_000_000 * 10**9
CAPABILITY = bytes.fromhex("0100000200200000000000000000000000000000")
ACL = b"\2\0\0\0" + b"".join(
    tag.to_bytes(2, "little") + bits.to_bytes(2, "little") + owner.to_bytes(4, "little", signed=True)
    for tag, bits, owner in ((0x01, 7, -1), (0x02, 5, 1000), (0x04, 5, -1), (0x10, 7, -1), (0x20, 5, -1))
)


T = TypeVar("T")

USER = Caller(1000, 1000)


def done(outcome: T | Job[T]) -> T:
    """The result of a request, all of it done here and now."""
    while isinstance(outcome, Job):
        outcome = done_here(outcome)
    return outcome


class Rig:
    """The requests of a tree that is being tried, with the files that a client has open."""

    def __init__(self, tree: UnionTree) -> None:
        self.tree = tree
        self.requests = UnionRequests(tree, tree.options)
        tree.use_writeback_cache(False)  # or times would be the kernel's business
        self.opened: list[OpenFile] = []

    def at(self, path: str) -> Inode:
        """The object at ``path``, which the kernel remembers from now on."""
        inode: Inode = self.tree.root
        for name in path.encode().split(b"/"):
            if name:
                inode = self.tree.lookup(as_directory(inode), name)
                inode.lookups += 1
        return inode

    def place(self, path: str) -> tuple[DirInode, bytes]:
        head, _, name = path.rpartition("/")
        return as_directory(self.at(head)), name.encode()

    def handle(self, file: OpenFile) -> int:
        return self.requests.add_file(file, os.O_RDWR, cached=False)

    def keep(self, file: OpenFile) -> None:
        self.opened.append(file)


# -- what there is --------------------------------------------------------------------------------------------------


def make_lowers(path: Path) -> None:
    """Two layers with one of everything."""
    top, below = path / "low1", path / "low2"
    for name in ("dir", "empty", "goned", "tomove/sub", "deep/er", "acl", "sticky"):
        (top / name).mkdir(parents=True)
    for name in ("dir/x", "dir/y", "deep/er/file", "tomove/sub/f", "acl/gone", "acl/stays", "sticky/gone"):
        (top / name).write_text(name * 10)
    for name in ("file", "copied", "gone", "gone2", "victim", "unlinked", "chowned"):
        (top / name).write_text(name * 1000)
    (top / "priv").write_text("priv" * 100)
    os.chmod(top / "priv", 0o6755)
    os.setxattr(top / "priv", "security.capability", CAPABILITY)
    os.setxattr(top / "file", "user.a", b"1")
    (top / "hard1").write_text("hard" * 100)
    os.link(top / "hard1", top / "hard2")
    (top / "link").symlink_to("target")
    os.mkfifo(top / "pipe")
    (below / "dir").mkdir(parents=True)
    (below / "dir/z").write_text("zz")
    (below / "under").write_text("under")
    os.setxattr(top / "acl", "system.posix_acl_default", ACL)
    os.chown(top / "sticky", 0, 77)
    os.chmod(top / "sticky", 0o2777)
    date_back(top)
    date_back(below)


def date_back(top: Path) -> None:
    for directory, dirs, files in os.walk(top, topdown=False):
        for name in (*dirs, *files, "."):
            os.utime(os.path.join(directory, name), ns=(LONG_AGO, LONG_AGO), follow_symlinks=False)


def make_upper(rig: Rig) -> None:
    """Change one of everything, by requests."""
    tree, root = rig.tree, rig.tree.root
    for name in ("gone", "gone2", "acl/gone", "sticky/gone"):
        tree.unlink(*rig.place(name))
    tree.rmdir(*rig.place("goned"))
    for name in ("up", "up2", "upriv"):
        _, file = tree.create(root, name.encode(), 0o644, os.O_RDWR, USER)
        os.pwrite(file.fd, name.encode() * 2000, 0)
        tree.close_file(file)
    done(rig.requests.set_attributes(rig.at("upriv"), AttributeChange(mode=0o6755), ROOT))
    done(rig.requests.set_xattr(rig.at("upriv"), b"security.capability", CAPABILITY, 0, ROOT))
    done(rig.requests.set_xattr(rig.at("up"), b"user.b", b"2", 0, ROOT))
    tree.link(rig.at("up2"), root, b"up2b")
    tree.mkdir(root, b"updir", 0o755, ROOT)
    tree.mkdir(root, b"upempty", 0o755, ROOT)
    _, file = tree.create(rig.at("updir"), b"in", 0o644, os.O_RDWR, ROOT)
    tree.close_file(file)
    tree.symlink(root, b"uplink", b"somewhere", ROOT)
    rig.requests.release(rig.handle(done(rig.requests.open(rig.at("copied"), os.O_RDWR, ROOT))))
    done(rig.requests.rename(*rig.place("tomove"), root, b"moved", 0, ROOT))
    # An upper directory that hides everything below, by whiteouts.
    tree.mkdir(root, b"whites", 0o755, ROOT)
    done(rig.requests.rename(*rig.place("victim"), root, b"victim2", 0, ROOT))
    done(rig.requests.rename(*rig.place("victim2"), root, b"victim", 0, ROOT))
    tree.unlink(*rig.place("dir/x"))


Shown = dict[str, tuple[Any, ...]]


def shown(tree: UnionTree, *, since: int) -> Shown:
    """Everything that a tree shows. Times since the beginning are told apart from those before, not from each other."""
    found: Shown = {}
    pending = [(tree.root, "")]
    while pending:
        directory, path = pending.pop()
        for name in sorted(tree.names(directory)):
            inode, where = tree.lookup(directory, name), f"{path}/{os.fsdecode(name)}"
            a = tree.attributes(inode)
            contents: Any = None
            if stat.S_ISREG(a.mode):
                file = tree.open(inode, os.O_RDONLY)
                contents = os.pread(file.fd, a.size + 1, 0)
                tree.close_file(file)
            elif stat.S_ISLNK(a.mode):
                contents = tree.readlink(inode)
            elif isinstance(inode, DirInode):
                pending.append((inode, where))
            is_dir = isinstance(inode, DirInode)
            xattrs = {n: tree.get_xattr(inode, n) for n in tree.list_xattrs(inode, ROOT)}
            # That whiteouts of a stacked overlay may come changes nothing for this one.
            xattrs.pop(b"trusted.overlay.opaque", None)
            # After a remount the names of a file of a lower layer are files of their own.
            counted = (
                isinstance(inode, FileInode)
                and inode.staged_link is None
                and "hard" not in where
                and contents != b"hard" * 100
            )
            links = a.nlink if counted else 0
            mtime = 0 if is_dir else min(a.mtime_ns, since)
            found[where] = (oct(a.mode), a.uid, a.gid, a.rdev, 0 if is_dir else a.size, links, mtime, xattrs, contents)
    return found


# -- the requests ---------------------------------------------------------------------------------------------------

Act = Callable[[Rig], None]


@dataclass(frozen=True)
class Request:
    """One request to try.

    Attributes:
        act: does it.
        first: is done before, without errors.
        reader: a file that somebody has open meanwhile.
        partly: whether it consists of several changes, each of which can fail: data goes, then a time is set, and
            whoever changes data takes privileges from the file before.
    """

    act: Act
    first: Act | None = None
    reader: str | None = None
    partly: bool = False


def create(path: str, *, mode: int = 0o644, caller: Caller = ROOT) -> Act:
    def act(rig: Rig) -> None:
        _, file = rig.tree.create(*rig.place(path), mode, os.O_RDWR, caller)
        rig.requests.release(rig.handle(file))

    return act


def mkdir(path: str, *, mode: int = 0o755, caller: Caller = ROOT) -> Act:
    def act(rig: Rig) -> None:
        rig.tree.mkdir(*rig.place(path), mode, caller)

    return act


def mknod(path: str, mode: int, caller: Caller = ROOT) -> Act:
    def act(rig: Rig) -> None:
        rig.tree.mknod(*rig.place(path), mode, 0, caller)

    return act


def symlink(path: str, caller: Caller = ROOT) -> Act:
    def act(rig: Rig) -> None:
        rig.tree.symlink(*rig.place(path), b"to", caller)

    return act


def link(source: str, path: str) -> Act:
    def act(rig: Rig) -> None:
        done(rig.requests.link(rig.at(source), *rig.place(path)))

    return act


def unlink(path: str) -> Act:
    def act(rig: Rig) -> None:
        rig.tree.unlink(*rig.place(path))

    return act


def rmdir(path: str) -> Act:
    def act(rig: Rig) -> None:
        rig.tree.rmdir(*rig.place(path))

    return act


def rename(old: str, new: str, flags: int = 0) -> Act:
    def act(rig: Rig) -> None:
        done(rig.requests.rename(*rig.place(old), *rig.place(new), flags, USER))

    return act


def change(path: str, caller: Caller = ROOT, values: dict[str, Any] | None = None) -> Act:
    def act(rig: Rig) -> None:
        done(rig.requests.set_attributes(rig.at(path), AttributeChange(**values or {}), caller))

    return act


def chattr(path: str, flags: int) -> Act:
    def act(rig: Rig) -> None:
        done(rig.requests.control(rig.at(path), FS_IOC_SETFLAGS, flags.to_bytes(4, "little"), 0))

    return act


def set_xattr(path: str, name: bytes = b"user.new", value: bytes = b"v") -> Act:
    def act(rig: Rig) -> None:
        done(rig.requests.set_xattr(rig.at(path), name, value, 0, ROOT))

    return act


def remove_xattr(path: str, name: bytes = b"user.a") -> Act:
    def act(rig: Rig) -> None:
        done(rig.requests.remove_xattr(rig.at(path), name))

    return act


def open_file(path: str, flags: int, caller: Caller = ROOT) -> Act:
    def act(rig: Rig) -> None:
        file = done(rig.requests.open(rig.at(path), flags, caller))
        rig.requests.release(rig.handle(file))

    return act


def hold(path: str, flags: int = os.O_RDWR) -> Act:
    """Open a file and leave it open."""

    def act(rig: Rig) -> None:
        rig.keep(done(rig.requests.open(rig.at(path), flags, ROOT)))

    return act


def reopen(rig: Rig) -> None:
    file = done(rig.requests.open(rig.opened[0].inode, os.O_RDWR, ROOT))
    rig.requests.release(rig.handle(file))


def hold_unnamed(rig: Rig) -> None:
    _, file = rig.tree.create_unnamed(rig.tree.root, 0o644, os.O_RDWR, USER)
    os.pwrite(file.fd, b"unnamed", 0)
    rig.keep(file)


def link_held(rig: Rig) -> None:
    done(rig.requests.link(rig.opened[-1].inode, rig.tree.root, b"named"))


def write(rig: Rig) -> None:
    handle = rig.handle(rig.opened[0])
    try:
        rig.requests.write(handle, 100, b"written" * 1000)
    finally:
        del rig.requests.files[handle]


def allocate(rig: Rig) -> None:
    handle = rig.handle(rig.opened[-1])
    try:
        done(rig.requests.fallocate(handle, 0, 0, 1 << 16))
    finally:
        del rig.requests.files[handle]


def copy_range(rig: Rig) -> None:
    target, source = (rig.handle(file) for file in rig.opened[-2:])
    try:
        done(rig.requests.copy_range(source, 0, target, 0, 4000))
    finally:
        del rig.requests.files[source], rig.requests.files[target]


def tmpfile(path: str, caller: Caller = ROOT) -> Act:
    def act(rig: Rig) -> None:
        _, file = rig.tree.create_unnamed(rig.at(path), 0o6755, os.O_RDWR, caller)
        rig.requests.release(rig.handle(file))

    return act


def both(*acts: Act) -> Act:
    def act(rig: Rig) -> None:
        for one in acts:
            one(rig)

    return act


def settle(rig: Rig) -> None:
    done(rig.requests.sync_copy(as_file(rig.at("file"))))


LATER = change("file", ROOT, {"mode": 0o600})  # makes a copy that is synced later
TIMES = {"atime_ns": LONG_AGO // 2, "mtime_ns": LONG_AGO // 2}

MAKING = {
    f"{name} {where}": Request(make(where))
    for name, make in (
        ("create", create),
        ("create of a user", partial(create, mode=0o6755, caller=USER)),
        ("mkdir", mkdir),
        ("mkdir of a user", partial(mkdir, caller=USER)),
        ("fifo", partial(mknod, mode=stat.S_IFIFO | 0o600)),
        ("whiteout", partial(mknod, mode=stat.S_IFCHR | 0o600)),
        ("symlink of a user", partial(symlink, caller=USER)),
    )
    for where in ("new", "gone", "dir/x", "dir/new", "deep/er/new", "acl/gone", "sticky/gone", "sticky/new")
}
LINKING = {
    f"link {source} {target}": Request(link(source, target))
    for source in ("file", "up", "copied", "up2", "hard1", "link", "pipe")
    for target in ("new", "gone", "deep/er/new")
} | {
    "link an unsynced file": Request(link("file", "new"), LATER),
    "link an unnamed file": Request(link_held, hold_unnamed),
    "link an unnamed file over a whiteout": Request(link_held, both(hold_unnamed, mkdir("named"), rmdir("named"))),
    **{f"unnamed {where}": Request(tmpfile(where, USER)) for where in ("", "deep/er", "sticky", "acl")},
}
REMOVING = (
    {
        f"unlink {name}": Request(unlink(name))
        for name in ("file", "up", "copied", "up2", "hard1", "link", "pipe", "dir/z", "deep/er/file", "moved/sub/f")
    }
    | {
        f"unlink {name} while it is open": Request(unlink(name), hold(name))
        for name in ("up", "copied", "file", "hard1")
    }
    | {
        f"unlink {name} while it is read": Request(unlink(name), hold(name, os.O_RDONLY))
        for name in ("file", "copied", "hard1")
    }
    | {
        f"rmdir {name}": Request(rmdir(name), first)
        for name, first in (
            ("upempty", None),
            ("empty", None),
            ("empty", change("empty", ROOT, {"mode": 0o700})),
            ("dir", both(unlink("dir/y"), unlink("dir/z"))),
            ("deep/er", unlink("deep/er/file")),
            ("updir", unlink("updir/in")),
        )
    }
    | {"unlink an unsynced file": Request(unlink("file"), LATER)}
)
EMPTY_DIR = both(unlink("dir/y"), unlink("dir/z"))
RENAMING = (
    {
        f"rename {old} {new}": Request(rename(old, new))
        for old in ("file", "up", "copied", "hard1", "link")
        for new in ("new", "gone", "under", "up2", "chowned", "copied2", "deep/er/new", "deep/er/file")
    }
    | {
        f"rename {old} {new}": Request(rename(old, new))
        for old in ("dir", "updir", "moved", "deep/er")
        for new in ("new", "goned", "empty", "upempty", "deep/new", "updir2")
        if not (old == "deep/er" and new == "deep/new")
    }
    | {
        f"rename {old} over emptied dir": Request(rename(old, "dir"), EMPTY_DIR)
        for old in ("updir", "deep/er", "empty")
    }
    | {
        f"exchange {old} {new}": Request(rename(old, new, RENAME_EXCHANGE))
        for old, new in (
            ("file", "up"),
            ("file", "copied"),
            ("file", "dir"),
            ("up", "up2"),
            ("dir", "updir"),
            ("dir", "moved"),
            ("deep/er/file", "file"),
            ("updir/in", "deep/er"),
        )
    }
    | {
        f"rename {old} if nothing is there": Request(rename(old, "new", RENAME_NOREPLACE))
        for old in ("file", "up", "dir")
    }
    | {
        f"rename {old} {new} leaving a whiteout": Request(rename(old, new, RENAME_WHITEOUT))
        for old in ("file", "up", "dir", "deep/er/file")
        for new in ("new", "gone")
    }
    | {f"rename an unsynced file {new}": Request(rename("file", new), LATER) for new in ("new", "gone", "up")}
    | {f"rename {old} over an open file": Request(rename(old, "copied"), hold("copied")) for old in ("file", "up")}
)
CHANGING = (
    {
        f"{what} {name}": Request(change(name, caller, values), partly="size" in values)
        for what, caller, values in (
            ("chmod", ROOT, {"mode": 0o640}),
            ("chown", ROOT, {"uid": 5, "gid": 6}),
            ("utimes", ROOT, TIMES),
            ("truncate", ROOT, {"size": 0}),
            ("shorten", ROOT, {"size": 10}),
            ("shorten by a user", USER, {"size": 10}),
            ("lengthen", ROOT, {"size": 9000}),
        )
        for name in ("file", "up", "copied", "priv", "upriv", "hard1", "deep/er/file")
    }
    | {
        f"{what} {name}": Request(change(name, ROOT, values))
        for what, values in (("chown", {"uid": 5, "gid": 6}), ("utimes", TIMES))
        for name in ("link", "uplink", "pipe", "dir", "empty", "deep/er", "moved")
    }
    | {
        f"chmod {name}": Request(change(name, ROOT, {"mode": 0o750}))
        for name in ("pipe", "dir", "empty", "deep/er", "moved")
    }
    | {f"a write takes privileges of {name}": Request(change(name, USER), partly=True) for name in ("priv", "upriv")}
    | {
        f"shorten {name} while it is open": Request(change(name, ROOT, {"size": 3}), hold(name), partly=True)
        for name in ("file", "up")
    }
    | {
        "shorten an unsynced file": Request(change("file", ROOT, {"size": 3}), LATER, partly=True),
        "chmod an unsynced file": Request(change("file", ROOT, {"mode": 0o755}), LATER),
        "settle an unsynced file": Request(settle, LATER),
    }
    | {
        f"set an attribute of {name}": Request(set_xattr(name))
        for name in ("file", "up", "copied", "dir", "updir", "hard1", "deep/er")
    }
    | {f"set an ACL of {name}": Request(set_xattr(name, b"system.posix_acl_access", ACL)) for name in ("file", "dir")}
    | {f"make {name} immutable": Request(chattr(name, FS_IMMUTABLE_FL)) for name in ("file", "up", "dir")}
    | {"set capabilities of an open file": Request(set_xattr("up", b"security.capability", CAPABILITY), hold("up"))}
    | {
        f"remove an attribute of {name}": Request(remove_xattr(name, attribute))
        for name, attribute in (("file", b"user.a"), ("up", b"user.b"), ("upriv", b"security.capability"))
    }
)
WRITING = {
    f"open {name} {how}": Request(open_file(name, flags, caller), reader=name, partly=caller is USER)
    for how, flags, caller in (
        ("to write", os.O_WRONLY, ROOT),
        ("and truncate", os.O_RDWR | os.O_TRUNC, ROOT),
        ("and truncate as a user", os.O_RDWR | os.O_TRUNC, USER),
    )
    for name in ("file", "up", "copied", "priv", "upriv", "hard1", "deep/er/file")
} | {
    "open an unsynced file to write": Request(open_file("file", os.O_RDWR), LATER, reader="file"),
    "open an unsynced file and truncate": Request(open_file("file", os.O_RDWR | os.O_TRUNC), LATER),
    "open an unlinked file to write": Request(reopen, both(hold("file", os.O_RDONLY), unlink("file"))),
    "write": Request(write, hold("up"), reader="up"),
    "write to a file with capabilities": Request(
        write, both(hold("up"), set_xattr("up", b"security.capability", CAPABILITY)), partly=True
    ),
}


LIMITED = {
    "allocate": Request(allocate, hold("up")),
    "copy a range": Request(copy_range, both(hold("up"), hold("copied"))),
}
REQUESTS = MAKING | LINKING | REMOVING | RENAMING | CHANGING | WRITING


def some(*beginnings: str) -> dict[str, Request]:
    """Those requests whose names begin so; every eighth of all others, too, where there is time for that."""
    others = [name for name in REQUESTS if not name.startswith(beginnings)][:: 8 if THOROUGH else len(REQUESTS)]
    return {name: request for name, request in REQUESTS.items() if name.startswith(beginnings) or name in others}


def use_marks(upper: UpperDir) -> None:
    """As where no device can be made."""
    upper._device_whiteouts = False


def use_names(upper: UpperDir) -> None:
    """As on a file system without O_TMPFILE."""
    upper._has_unnamed_files = False


@dataclass(frozen=True)
class Variant:
    """Another kind of mount: its options, what its upper directory lacks, and the requests to try."""

    requests: dict[str, Request]
    options: dict[str, Any] = field(default_factory=dict)
    lacks: Callable[[UpperDir], None] = lambda upper: None


VARIANTS = {
    "with a quota": Variant(
        LIMITED
        | some("create gone", "link hard1 new", "unlink hard1 while", "rename file gone", "lengthen up", "write"),
        {"quota_bytes": 1 << 30},
    ),
    "with marks": Variant(
        some(
            *("create of a user gone", "mkdir gone", "link file gone", "unlink file", "unlink up", "rmdir dir"),
            *("rename file gone", "rename up goned", "rename dir goned", "rename dir empty", "rename file new leaving"),
        ),
        lacks=use_marks,
    ),
    "without unnamed files": Variant(
        some(
            "chown file", "chown hard1", "shorten file", "open file", "open hard1 to", "open an un", "rename file new"
        ),
        lacks=use_names,
    ),
}


# -- trying them ----------------------------------------------------------------------------------------------------


class Trial:
    """One kind of mount, on directories that are made anew for each try."""

    def __init__(
        self, path: Path, injected: Faults, lacks: Callable[[UpperDir], None] = lambda upper: None, **options: Any
    ) -> None:
        self.path = path
        self.faults = injected
        self.lacks = lacks
        self.options = options_in(path, "low1", "low2", **options)
        make_lowers(path)
        for name in ("upper", "work", "other"):
            (path / name).mkdir()
        tree = self.open(self.options)
        make_upper(Rig(tree))
        tree.close()
        date_back(path / "upper")
        (path / "upper").rename(path / "template")
        self.since = time.time_ns()
        self.lowers = {top: disk_state(path / top) for top in ("low1", "low2")}

    def open(self, options: MountOptions) -> UnionTree:
        tree = open_tree(options)
        if tree.view.upper is not None:
            self.lacks(tree.view.upper)
        return tree

    def start(self) -> Rig:
        """A tree as it is before each request."""
        top = os.open(self.path, os.O_RDONLY)
        for name in (b"upper", b"work"):
            remove_tree(top, name)
        os.close(top)
        subprocess.run(["cp", "-a", self.path / "template", self.path / "upper"], check=True)
        (self.path / "work").mkdir()
        return Rig(self.open(self.options))

    def shown(self, tree: UnionTree) -> Shown:
        return shown(tree, since=self.since)

    def shown_afresh(self, rig: Rig) -> Shown:
        """What a mount of the same directories shows that remembers nothing."""
        for inode in rig.tree.inodes:  # as the end of the mount does
            if isinstance(inode, FileInode):
                rig.tree.copy_up.place_names(inode)
        tree = self.open(replace(self.options, workdir=str(self.path / "other")))
        try:
            return self.shown(tree)
        finally:
            tree.close()

    def run(self, request: Request) -> None:
        """Try ``request`` with each error at each of its system calls."""
        before, after, calls = self.without_errors(request)
        assert calls
        problems: list[str] = []
        for lasting, codes in ((False, ERRORS), (True, LASTING)):
            # One error each is enough for every day: what differs between them are a few special cases.
            for shift in range(len(codes) if THOROUGH else 1):
                fail_at = 0
                while self.fault(
                    request, fail_at, codes[(fail_at + shift) % len(codes)], lasting, before, after, problems
                ):
                    fail_at += 1
        assert {top: disk_state(self.path / top) for top in self.lowers} == self.lowers
        assert not problems, "\n".join(problems)

    def without_errors(self, request: Request) -> tuple[Shown, Shown, list[str]]:
        """What is shown before ``request`` and after it, and the system calls it makes."""
        rig = self.start()
        try:
            if request.first is not None:
                request.first(rig)
            before = self.shown(rig.tree)
            with self.faults.injected(-1, 0):
                request.act(rig)
            after = self.shown(rig.tree)
            assert after == self.shown_afresh(rig)
            return before, after, self.faults.calls
        finally:
            rig.tree.close()

    def fault(
        self, request: Request, fail_at: int, code: int, lasting: bool, before: Shown, after: Shown, problems: list[str]
    ) -> bool:
        """Try it with one error; false if the request was done before it came to that call."""
        descriptors = len(os.listdir("/proc/self/fd"))
        rig = self.start()
        said: BaseException | None = None

        def wrong(what: str) -> None:
            how = f"{errno.errorcode[code]}{' from then on' if lasting else ''} at {self.faults.failed}: {said!r}"
            problems.append(f"{how}: {what}")

        try:
            if request.first is not None:
                request.first(rig)
            if request.reader is not None:
                rig.keep(rig.tree.open(rig.at(request.reader), os.O_RDONLY))
            opened = len(rig.opened)
            with self.faults.injected(fail_at, code, lasting=lasting):
                try:
                    request.act(rig)
                except BaseException as error:
                    said = error
            if self.faults.failed is None:
                assert said is None, said
                return False
            if said is not None and getattr(said, "errno", None) not in (code, EXDEV_FOR.get(code)):
                wrong("another error")
            now = self.shown(rig.tree)
            # What is asked when all is done, for the answer, may fail too.
            asked = self.faults.failed.split()[1].partition("(")[0] in ASKING
            is_done = now == after and (said is None or asked)
            if request.partly:
                whole = essence(now) in (essence(before), essence(after))
            else:
                whole = is_done or (said is not None and now == before)
            if not whole:
                wrong(f"neither here nor there: {differences(now, after if said is None else before)}")
            afresh = self.shown_afresh(rig)
            if now != afresh:
                wrong(f"not what is on the disk: {differences(now, afresh)}")
            if rig.tree.statistics()["open_files"] != opened:
                wrong("a file stays open")
            if not is_done:
                try:
                    request.act(rig)
                except BaseException as error:
                    wrong(f"cannot be done later: {error!r}")
                now = self.shown(rig.tree)
                if now != after:
                    wrong(f"not right later: {differences(now, after)}")
            for file in rig.opened:
                self.check_reader(rig, file, wrong)
            if not asked:  # of a file that cannot be asked for its blocks, the next count of everything sees them
                self.check_space(rig.tree, wrong)
        except OSError as error:
            wrong(f"cannot be looked at: {error!r}")
        finally:
            rig.tree.close()
        if len(os.listdir("/proc/self/fd")) != descriptors:
            wrong("descriptors leak")
        tree = self.open(self.options)
        if left := [*os.listdir(self.path / "work/work"), *(set(os.listdir(self.path / "work")) - {"work"})]:
            wrong(f"left in the work directory: {left}")
        if self.shown(tree) != after:
            wrong("not the same after a remount")
        tree.close()
        return True

    @staticmethod
    def check_reader(rig: Rig, file: OpenFile, wrong: Callable[[str], None]) -> None:
        """Whether somebody who has had a file open sees what is in it now."""
        inode = file.inode
        if inode.orphan:
            return
        again = rig.tree.open(inode, os.O_RDONLY)
        if os.pread(again.fd, 1 << 20, 0) != os.pread(file.fd, 1 << 20, 0):
            wrong("an open file has old data")
        rig.tree.close_file(again)

    @staticmethod
    def check_space(tree: UnionTree, wrong: Callable[[str], None]) -> None:
        """Whether what is counted of a limited upper directory is what is there."""
        if tree.space is not None:
            used, promised = (
                tree.space.used_bytes,
                tree.space.limit_bytes - tree.space.used_bytes - tree.space.free_bytes,
            )
            tree.space._count_all()
            if used != tree.space.used_bytes or promised:
                wrong(f"{used} bytes are counted and {promised} promised; there are {tree.space.used_bytes}")


def disk_state(top: Path) -> list[tuple[Any, ...]]:
    """Everything below a directory, as it is on the disk."""
    found: list[tuple[Any, ...]] = []
    for path in sorted(top.rglob("*")):
        st = path.lstat()
        contents = path.read_bytes() if path.is_file() and not path.is_symlink() else b""
        found.append((path, st.st_mode, st.st_uid, st.st_gid, st.st_nlink, st.st_mtime_ns, st.st_ctime_ns, contents))
    return found


def essence(tree: Shown) -> Shown:
    """What is shown but times of files and privileges."""
    return {
        path: (
            oct(int(mode, 8) & ~0o6000),
            *some,
            {n: v for n, v in xattrs.items() if n != b"security.capability"},
            last,
        )
        for path, (mode, *some, _, xattrs, last) in tree.items()
    }


def differences(one: Shown, other: Shown) -> str:
    names = [name for name in sorted({*one, *other}) if one.get(name) != other.get(name)]
    return "; ".join(f"{name} {str(one.get(name))[:200]} != {str(other.get(name))[:200]}" for name in names[:3])


@pytest.fixture(scope="module")
def injected() -> Iterator[Faults]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(workdir, "_NOTICES_WITHIN_S", 0.0)  # what is compared is mounted twice
        yield faults.install(monkeypatch)


@pytest.fixture(scope="module")
def memory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A file system that is quick: there are thousands of tries."""
    path = tmp_path_factory.mktemp("memory")
    mount("tmpfs", str(path), "tmpfs")
    yield path
    umount2(str(path), MNT_DETACH)


@pytest.fixture(scope="module")
def plain(memory: Path, injected: Faults) -> Trial:
    (memory / "plain").mkdir()
    return Trial(memory / "plain", injected)


@pytest.mark.parametrize("name", REQUESTS)
def test_each_call_fails(plain: Trial, name: str) -> None:
    plain.run(REQUESTS[name])


@pytest.fixture(scope="module")
def variants(memory: Path, injected: Faults) -> Callable[[str], Trial]:
    @functools.cache
    def trial(kind: str) -> Trial:
        path = memory / kind.replace(" ", "-")
        path.mkdir()
        return Trial(path, injected, VARIANTS[kind].lacks, **VARIANTS[kind].options)

    return trial


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, v in VARIANTS.items() for name in v.requests])
def test_each_call_fails_on_other_mounts(variants: Callable[[str], Trial], kind: str, name: str) -> None:
    variants(kind).run(VARIANTS[kind].requests[name])


# -- what is not a request ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["new", "limited", "read-only", "after a crash"])
def test_each_call_of_opening_fails(memory: Path, injected: Faults, kind: str) -> None:
    """It is said in one line what is wrong, nothing stays open, and later it can be mounted."""
    path = memory / f"open-{kind}"
    path.mkdir()
    trial = Trial(path, injected, quota_bytes=1 << 30 if kind == "limited" else 0)
    options = trial.options if kind != "read-only" else replace(trial.options, read_only=True)
    for code in ERRORS:
        fail_at = 0
        while True:
            tree = trial.start().tree
            if kind == "after a crash":
                LATER(Rig(tree))
                tree.copy_up.unsynced = None  # nothing is settled
            tree.close()
            descriptors = len(os.listdir("/proc/self/fd"))
            refused = False
            with injected.injected(fail_at, code):
                try:
                    tree = open_tree(options)
                except LayerError as error:
                    refused = True
                    assert "\n" not in str(error)
                    assert os.strerror(code).lower() in str(error).lower()
            if not refused:
                tree.close()
            assert len(os.listdir("/proc/self/fd")) == descriptors, injected.failed
            if injected.failed is None:
                break
            tree = open_tree(options)
            assert (tree.find(tree.root, b"gone") is None) == (kind != "read-only")
            assert not tree.warnings
            tree.close()
            fail_at += 1


def test_the_answer_to_a_write_is_that_of_the_write(plain: Trial) -> None:
    rig = plain.start()
    hold("up")(rig)
    set_xattr("up", b"security.capability", CAPABILITY)(rig)
    handle = rig.handle(rig.opened[0])
    with plain.faults.injected(1, errno.EIO):  # giving the capabilities back
        assert rig.requests.write(handle, 0, b"new") == 3
    assert plain.faults.failed
    with plain.faults.injected(0, errno.ENOSPC, lasting=True), pytest.raises(OSError) as raised:
        rig.requests.write(handle, 0, b"newer")
    assert raised.value.errno == errno.ENOSPC
    rig.tree.close()


@pytest.mark.parametrize("name", ["rename", "link"])
def test_a_new_name_for_an_unsynced_file_waits_for_the_disk_in_a_thread(plain: Trial, name: str) -> None:
    """All other clients would wait, too."""
    rig = plain.start()
    LATER(rig)
    inode, new = as_file(rig.at("file")), rig.place("new")
    with plain.faults.injected(-1, 0):
        requests = rig.requests
        outcome = requests.link(inode, *new) if name == "link" else requests.rename(*rig.place("file"), *new, 0, ROOT)
        assert isinstance(outcome, Job)
        assert "fsync" not in plain.faults.calls
        while isinstance(outcome, Job):
            outcome = done_here(outcome)
        assert "fsync" in plain.faults.calls
    assert not inode.unsynced
    rig.tree.close()


def test_the_mark_of_a_metacopy_is_gone_from_the_disk_before_its_data_is_changed(
    memory: Path, injected: Faults
) -> None:
    """Or a crash could bring it back over data that a client has synced."""
    (memory / "marks").mkdir()
    trial = Trial(memory / "marks", injected, metacopy=True)
    rig = trial.start()
    change("file", ROOT, {"mode": 0o600})(rig)
    with injected.injected(-1, 0):
        open_file("file", os.O_RDWR)(rig)
    ends = [call for call in injected.calls if call in ("fsync", "removexattr")]
    assert ends[0] == ends[-1] == "fsync"
    assert "removexattr" in ends
    rig.tree.close()
