"""One tree from the same layers, whoever reads them: the mount's tree, archives, the tree after a remount, the kernel.

Random layers with every dialect of whiteouts and opaque marks, redirects and metacopies, also behind each other, and
random renames and removals on top.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, example, given, note
from hypothesis import strategies as st

from tests.support.mounts import mounted_overlay, mounted_tmpfs
from tests.support.sandbox import needs_root
from unionfs.archive.changes import changes_of_upper
from unionfs.archive.overlay_view import Node, OverlayView
from unionfs.fuse_ops.options import MountOptions
from unionfs.fuse_ops.session.assembly import open_tree
from unionfs.fuse_ops.tree.inodes import Inode
from unionfs.fuse_ops.union.union_tree import UnionTree
from unionfs.host.files import RootedDir

pytestmark = [pytest.mark.differential]

needs_root()

PREFIX = "trusted.overlay."
NAMES = ("a", "b", "c")

Listing = dict[str, str]
"""What a view shows: for each path ``dir``, the contents of a file, or ``lost`` for a metacopy without its data."""


@dataclass(frozen=True)
class Entry:
    """What a layer's directory has under a name, and beside it."""

    kind: str  # "", "file", "dir", "whiteout", "xattr whiteout", "metacopy"
    mark: bool = False  # `.wh.NAME` beside it
    opaque: str = ""  # of a directory: "", "xattr", "mark", "fuse-overlayfs"
    redirect: str = ""
    children: dict[str, Entry] = field(default_factory=dict)


REDIRECTS = st.sampled_from(["", "", "", "a", "b", "c", "/a", "/b", "/a/b", "/b/c", "/nothing"])
FILES = st.builds(
    Entry, st.sampled_from(["file", "file", "whiteout", "xattr whiteout", ""]), st.booleans()
) | st.builds(Entry, st.just("metacopy"), st.booleans(), redirect=REDIRECTS)


def directories(children: st.SearchStrategy[Entry]) -> st.SearchStrategy[Entry]:
    return st.builds(
        Entry,
        st.just("dir"),
        st.sampled_from([False, False, True]),
        st.sampled_from(["", "", "", "xattr", "mark", "fuse-overlayfs"]),
        REDIRECTS,
        st.dictionaries(st.sampled_from(NAMES), children, max_size=3),
    )


ENTRIES = st.deferred(lambda: FILES | directories(FILES | directories(FILES)))
LAYERS = st.builds(
    Entry,
    st.just("dir"),
    opaque=st.sampled_from(["", "", "", "", "mark"]),
    children=st.dictionaries(st.sampled_from(NAMES), ENTRIES, min_size=1, max_size=3),
)
PATHS = st.lists(st.sampled_from(NAMES), min_size=1, max_size=3).map("/".join)
STEPS = st.lists(
    st.tuples(st.just("rename"), PATHS, PATHS) | st.tuples(st.sampled_from(["remove", "mkdir", "new"]), PATHS),
    max_size=4,
)


def has_xattr_whiteouts(entry: Entry) -> bool:
    """Whether there is such a whiteout anywhere in it."""
    return entry.kind == "xattr whiteout" or any(has_xattr_whiteouts(child) for child in entry.children.values())


def build(path: Path, entry: Entry, layer: str, *, top: bool = False) -> None:
    """Put ``entry`` at ``path``; files contain which layer they are of."""
    if entry.kind == "dir":
        path.mkdir(exist_ok=top)
        if entry.opaque == "xattr":
            os.setxattr(path, PREFIX + "opaque", b"y")
        elif entry.opaque == "fuse-overlayfs":
            os.setxattr(path, "user.fuseoverlayfs.opaque", b"y")
        elif entry.opaque == "mark":
            (path / ".wh..wh..opq").touch()
        if entry.redirect and not top:
            os.setxattr(path, PREFIX + "redirect", entry.redirect.encode())
        for name, child in entry.children.items():
            build(path / name, child, layer)
            if child.mark:
                (path / f".wh.{name}").touch()
        # The kernel looks for them only in layers of which the top directory says so, too.
        if has_xattr_whiteouts(entry) if top else any(c.kind == "xattr whiteout" for c in entry.children.values()):
            os.setxattr(path, PREFIX + "opaque", b"x")
    elif entry.kind == "whiteout":
        os.mknod(path, stat.S_IFCHR, 0)
    elif entry.kind == "file":
        path.write_text(f"{layer}:{path.name}")
    elif entry.kind == "xattr whiteout":
        path.touch()
        os.setxattr(path, PREFIX + "whiteout", b"y")
    elif entry.kind == "metacopy":
        with open(path, "wb") as file:
            file.truncate(100)
        os.setxattr(path, PREFIX + "metacopy", b"")
        if entry.redirect:
            os.setxattr(path, PREFIX + "redirect", entry.redirect.encode())


# -- the views ------------------------------------------------------------------------------------------------


def of_tree(tree: UnionTree) -> Listing:
    found: Listing = {}

    def read(inode: Inode) -> str:
        try:
            file = tree.open(inode, os.O_RDONLY)
        except OSError as error:
            assert error.errno == errno.EIO
            return "lost"
        try:
            return os.pread(file.fd, 1000, 0).decode()
        finally:
            tree.close_file(file)

    def visit(directory: Inode, path: str) -> None:
        for name in tree.names(directory):
            inode = tree.lookup(directory, name)
            below = f"{path}/{name.decode()}"
            found[below] = "dir" if inode.kind == stat.S_IFDIR else read(inode)
            if inode.kind == stat.S_IFDIR:
                visit(inode, below)
        for name in map(str.encode, NAMES):
            assert (tree.find(directory, name) is None) == (f"{path}/{name.decode()}" not in found), (
                "listing and lookup"
            )

    visit(tree.root, "")
    return found


def of_archive(paths: list[Path]) -> Listing:
    found: Listing = {}
    with ExitStack() as close:
        view = OverlayView([close.enter_context(RootedDir(str(path))) for path in paths])

        def read(node: Node) -> str:
            if node.data is None:
                return "lost"
            fd = node.data.layer.open_file(node.data.rel)
            try:
                return os.pread(fd, 1000, 0).decode()
            finally:
                os.close(fd)

        def visit(directory: Node, path: str) -> None:
            with view.open(directory) as here:
                for name in sorted(here.names()):
                    node = here.lookup(name)
                    if node is None:
                        continue
                    below = f"{path}/{name.decode()}"
                    found[below] = "dir" if node.is_dir else read(node)
                    if node.is_dir:
                        visit(node, below)

        visit(view.root(), "")
    return found


def of_mount(top: str) -> Listing:
    found: Listing = {}

    def visit(path: str) -> None:
        for name in os.listdir(top + path):
            below = f"{path}/{name}"
            try:
                is_dir = stat.S_ISDIR(os.lstat(top + below).st_mode)
            except FileNotFoundError:  # it lists whiteouts that are attributes where nothing lies below
                continue
            if is_dir:
                found[below] = "dir"
                visit(below)
            else:
                with open(top + below) as file:
                    found[below] = file.read()

    visit("")
    return found


def added_and_deleted(old: Listing, new: Listing) -> list[str]:
    """The lines of a change list from ``old`` to ``new``, but for what was modified."""
    lines = [(path, "A") for path in new.keys() - old.keys()]
    for path in old.keys() - new.keys():
        parent = path.rpartition("/")[0]
        if not parent or new.get(parent) == "dir":
            lines.append((path, "D"))
    return [f"{kind} {path}" for path, kind in sorted(lines)]


def changed_kinds(old: Listing, new: Listing) -> set[str]:
    """Files with other contents, and directories that took the place of files, or the other way round."""
    return {path for path in old.keys() & new.keys() if old[path] != new[path]}


# -- the comparison -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def memory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with mounted_tmpfs(str(tmp_path_factory.mktemp("views") / "memory")) as top:
        yield Path(top)


@contextmanager
def built(memory: Path, stack: list[Entry]) -> Iterator[Path]:
    """The layers of ``stack``, the upper directory first, as ``0``, ``1``... in a directory of their own."""
    top = Path(tempfile.mkdtemp(dir=memory))
    try:
        for number, layer in enumerate(stack):
            (top / str(number)).mkdir()
            build(top / str(number), layer, str(number), top=True)
        for name in ("work", "mnt"):
            (top / name).mkdir()
        yield top
    finally:
        shutil.rmtree(top)


def opened(top: Path, layers: int) -> UnionTree:
    return open_tree(
        MountOptions(
            lowerdirs=tuple(str(top / str(number)) for number in range(1, layers)),
            upperdir=str(top / "0"),
            workdir=str(top / "work"),
        )
    )


class User:
    uid = gid = pid = 0


def place(tree: UnionTree, path: str) -> tuple[Inode, bytes]:
    inode: Inode = tree.root
    *above, name = path.encode().split(b"/")
    for part in above:
        inode = tree.lookup(inode, part)
        if inode.kind != stat.S_IFDIR:
            raise NotADirectoryError
    return inode, name


def take(tree: UnionTree, step: tuple[str, ...]) -> None:
    """Do a step; what is refused is not done, as it would be by programs."""
    actions: dict[str, Callable[..., Any]] = {
        "rename": lambda old, new: tree.rename(*place(tree, old), *place(tree, new)),
        "remove": lambda path: (tree.rmdir if tree.lookup(*place(tree, path)).kind == stat.S_IFDIR else tree.unlink)(
            *place(tree, path)
        ),
        "mkdir": lambda path: tree.mkdir(*place(tree, path), 0o755, User()),
        "new": lambda path: tree.mknod(*place(tree, path), stat.S_IFREG | 0o644, 0, User()),
    }
    name, *paths = step
    if name == "rename" and paths[1].startswith(paths[0] + "/"):
        return  # the kernel does not let that through
    try:
        actions[name](*paths)
    except OSError as error:
        note(f"{step}: {error}")


OPQ = [
    Entry("dir"),
    Entry(
        "dir", children={"a": Entry("dir", opaque="mark", children={"b": Entry("dir", children={"a": Entry("file")})})}
    ),
    Entry("dir", children={"a": Entry("dir", children={"b": Entry("dir", children={"b": Entry("file")})})}),
]


@given(st.lists(LAYERS, min_size=2, max_size=4), STEPS)
@example(OPQ, [("rename", "a/b", "b")])
@example(OPQ, [("rename", "a/b", "a/c")])
def test_all_show_one_tree(memory: Path, stack: list[Entry], steps: list[tuple[str, ...]]) -> None:
    with built(memory, stack) as top:
        paths = [top / str(number) for number in range(len(stack))]
        tree = opened(top, len(stack))
        live = of_tree(tree)
        assert of_archive(paths) == live, "archive"
        for step in steps:
            take(tree, step)
        live = of_tree(tree)
        tree.close()
        assert of_archive(paths) == live, "archive, after changes"
        listed = [str(change) for change in changes_of_upper(str(paths[0]), [str(path) for path in paths[1:]])]
        assert [line for line in listed if not line.startswith("C")] == added_and_deleted(of_archive(paths[1:]), live)
        assert {line[2:] for line in listed if line.startswith("C")} >= changed_kinds(of_archive(paths[1:]), live)
        tree = opened(top, len(stack))
        assert of_tree(tree) == live, "remount"
        tree.close()


def kernels(entry: Entry, name: str = "") -> Entry:
    """``entry`` with what the kernel knows, and no redirects: it wants each directory to be moved to one place only."""
    children = {name: kernels(child, name) for name, child in entry.children.items()}
    kind = "file" if entry.kind == "metacopy" and name != "c" else entry.kind  # most would have lost their data
    return Entry(kind, opaque="xattr" if entry.opaque else "", children=children)


@given(st.lists(LAYERS.map(kernels), min_size=1, max_size=3), STEPS, STEPS)
def test_the_kernel_shows_the_same(
    memory: Path, stack: list[Entry], first: list[tuple[str, ...]], second: list[tuple[str, ...]]
) -> None:
    """Redirects are made by moves, and then lie in a lower layer."""
    with built(memory, [Entry("dir"), Entry("dir"), *stack]) as top:
        lowers = tuple(str(top / str(number)) for number in range(2, len(stack) + 2))
        for upper, steps in (("1", first), ("0", second)):
            options = MountOptions(lowerdirs=lowers, upperdir=str(top / upper), workdir=str(top / "work"))
            tree = open_tree(options)
            for step in steps:
                take(tree, step)
            live = of_tree(tree)
            tree.close()
            assume("lost" not in live.values())  # which the kernel does not even list
            with mounted_overlay(
                lowers, options.upperdir, options.workdir, str(top / "mnt"), ("redirect_dir=on", "metacopy=on")
            ) as mnt:
                assert of_mount(mnt) == live
            lowers = (str(top / upper), *lowers)
