"""Change lists of upper directories that the kernel's overlayfs wrote, against a comparison of the mounted trees."""

from __future__ import annotations

import contextlib
import io
import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.archive.trees import describe
from tests.support.syscalls import mount, umount2, unshare_mounts
from tests.support.users import in_child
from unionfs.archive.changes import Change, ChangeKind, changes_of_trees, changes_of_upper
from unionfs.archive.pack import PackOptions, pack_changes, pack_tree
from unionfs.archive.unpacking import UnpackOptions, WhiteoutMode, unpack

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounting overlayfs needs root")


@contextlib.contextmanager
def overlay(target: Path, lowers: list[Path], upper: Path | None, work: Path | None, options: str) -> Iterator[None]:
    data = "lowerdir=" + ":".join(str(lower) for lower in lowers)
    if upper is not None:
        data += f",upperdir={upper},workdir={work}"
    target.mkdir(exist_ok=True)
    # The system calls: umount(8) looks into the mount table first, and misses entries while others mount.
    try:
        mount("overlay", str(target), "overlay", data=data + "," + options)
    except OSError as error:
        pytest.skip(f"the kernel does not mount overlayfs here: {error}")
    try:
        yield
    finally:
        umount2(str(target))


NAMES = ("a", "a-", "b", "c")


def some_path(random_: random.Random, root: Path) -> Path:
    return root.joinpath(*random_.choices(NAMES, k=random_.randint(1, 3)))


def mutate(random_: random.Random, root: Path, steps: int) -> None:
    """Random operations, many of which fail: that is what makes the tree odd."""
    for _ in range(steps):
        path, other = some_path(random_, root), some_path(random_, root)
        with contextlib.suppress(OSError, shutil.Error):
            match random_.randrange(12):
                case 0 | 1:
                    path.mkdir()
                case 2 | 3:
                    path.write_bytes(random_.randbytes(random_.randint(0, 3)))
                case 4:
                    os.symlink("target", path)
                case 5:
                    os.rename(path, other)
                case 6:
                    path.unlink()
                case 7:
                    shutil.rmtree(path)
                case 8:
                    path.chmod(random_.choice((0o755, 0o700)))
                case 9:
                    os.link(path, other)
                case 10:
                    with path.open("ab"):
                        pass
                case 11:
                    os.utime(path, (random_.randint(1, 3), random_.randint(1, 3)))


def exact(changes: Iterator[Change]) -> set[str]:
    return {str(change) for change in changes}


@pytest.mark.parametrize(
    "options", ["redirect_dir=off,metacopy=off,index=off", "redirect_dir=on,metacopy=on,index=off"]
)
@pytest.mark.parametrize("seed", range(int(os.environ.get("UNIONFS_ARCHIVE_SEEDS", "12"))))
def test_upper_written_by_the_kernel(tmp_path: Path, options: str, seed: int) -> None:
    def alone() -> None:
        # What others mount and unmount on this machine meanwhile does not reach a mount namespace of its own, and
        # nothing stays mounted when this dies.
        unshare_mounts()
        check_chain_of_layers(tmp_path, options, seed)

    in_child(alone)


def check_chain_of_layers(tmp_path: Path, options: str, seed: int) -> None:
    random_ = random.Random(seed)
    lowers: list[Path] = [tmp_path / "base"]
    lowers[0].mkdir()
    mutate(random_, lowers[0], 60)
    for layer in range(3):
        upper, work = tmp_path / f"upper{layer}", tmp_path / f"work{layer}"
        upper.mkdir()
        work.mkdir()
        with overlay(tmp_path / "merged", lowers, upper, work, options):
            mutate(random_, tmp_path / "merged", 30)
        empty = tmp_path / "empty"
        empty.mkdir(exist_ok=True)
        with (
            overlay(tmp_path / "old", [*lowers, empty], None, None, options),
            overlay(tmp_path / "new", [upper, *lowers], None, None, options),
        ):
            naive = exact(changes_of_trees(str(tmp_path / "new"), str(tmp_path / "old")))
            ours = list(changes_of_upper(str(upper), [str(lower) for lower in lowers]))
            check_places(ours, tmp_path / "new")
            paths = [change.path for change in ours]
            assert paths == sorted(set(paths))
            extra = exact(iter(ours)) ^ naive
            # What the naive comparison cannot see: contents that differ while size and time agree (and the
            # parents of such an entry). It must be a real difference of contents or a missed fraction of a second.
            missing = {line for line in extra if line in naive}
            assert not missing
            for change in ours:
                if str(change) in extra:
                    assert change.kind is ChangeKind.MODIFY
                    assert really_differs(change, tmp_path, ours)
            check_layer_archive(tmp_path, upper, ours, lowers, converts="redirect_dir=off" in options)
        lowers.insert(0, upper)


def really_differs(change: Change, base: Path, ours: list[Change]) -> bool:
    rel = os.fsdecode(change.path[1:])
    new, old = base / "new" / rel, base / "old" / rel
    if new.is_dir() and not new.is_symlink():
        return any(c.path.startswith(change.path + b"/") for c in ours)
    if new.is_symlink():
        return os.readlink(new) != os.readlink(old) or new.lstat().st_mtime_ns != old.lstat().st_mtime_ns
    return new.read_bytes() != old.read_bytes() or new.lstat().st_mtime_ns != old.lstat().st_mtime_ns


def shown(root: Path) -> dict[bytes, Any]:
    """A tree as far as a layer carries it: links to names in other layers, and times of directories, it does not."""
    tree = describe(root, xattrs=False)
    for node in tree.values():
        node.pop("link", None)
        if node["mode"].startswith("0o40"):
            node.pop("mtime")
    return tree


def check_layer_archive(base: Path, upper: Path, changes: list[Change], lowers: list[Path], *, converts: bool) -> None:
    """The archive of the changes makes the new tree of the old one, in both ways of applying it."""
    layer = b"".join(pack_changes(changes))
    assert layer == b"".join(pack_changes(changes_of_upper(str(upper), [str(lower) for lower in lowers])))
    expected = shown(base / "new")
    copy = base / "copy"
    subprocess.run(["cp", "-a", base / "old", copy], check=True)
    unpack(io.BytesIO(layer), str(copy))
    assert shown(copy) == expected
    shutil.rmtree(copy)

    bare = [layer]
    if converts:
        bare.append(b"".join(pack_tree(str(upper), PackOptions(convert_whiteouts=True))))
    for data in bare:
        rebuilt = base / "rebuilt"
        rebuilt.mkdir()
        unpack(io.BytesIO(data), str(rebuilt), UnpackOptions(whiteouts=WhiteoutMode.OVERLAY))
        with overlay(base / "mounted", [rebuilt, *lowers], None, None, "redirect_dir=on,metacopy=on"):
            assert shown(base / "mounted") == expected
        shutil.rmtree(rebuilt)


def check_places(changes: list[Change], merged: Path) -> None:
    """The places named in a change list hold what the mounted tree shows."""
    for change in changes:
        visible = merged / os.fsdecode(change.path[1:])
        if change.kind is ChangeKind.DELETE:
            assert not os.path.lexists(visible)
            continue
        assert change.stat is not None
        info = os.lstat(visible)
        if not visible.is_dir():
            assert (info.st_mode, info.st_size, info.st_mtime_ns) == (
                change.stat.st_mode,
                change.stat.st_size,
                change.stat.st_mtime_ns,
            )
        if visible.is_file() and not visible.is_symlink():
            assert change.data is not None
            assert (
                visible.read_bytes()
                == (Path(os.fsdecode(change.data.root)) / os.fsdecode(change.data.rel)).read_bytes()
            )
