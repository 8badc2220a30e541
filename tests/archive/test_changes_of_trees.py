"""Change lists of two complete trees: moby's archive change tests by name, and the rules around them."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.archive.trees import write
from unionfs.archive.changes import changes_of_trees, changes_of_upper, size_of


def listed(new: Path, old: Path | None) -> list[str]:
    return [str(change) for change in changes_of_trees(str(new), None if old is None else str(old))]


def sample(root: Path) -> Path:
    """The tree that moby's change tests start from (restated from its shape, names included)."""
    for i in range(1, 4):
        for j in range(1, 4):
            write(root / f"dir{i}/file{i}-{j}", f"{i}{j}", mtime=1000 + i)
        os.utime(root / f"dir{i}", (2000, 2000))
    for i in range(1, 8):
        write(root / f"file{i}", f"file{i}\n", mtime=1000)
    for i in range(1, 4):
        os.symlink(f"target{i}", root / f"symlink{i}")
    write(root / "dir1/subfolder/existing", "x")
    return root


def copy(source: Path, target: Path) -> Path:
    subprocess.run(["cp", "-a", source, target], check=True)
    return target


def test_changes_with_no_changes(tmp_path: Path) -> None:
    """TestChangesWithNoChanges"""
    old = sample(tmp_path / "old")
    (tmp_path / "rw").mkdir()
    assert list(changes_of_upper(str(tmp_path / "rw"), [str(old)])) == []


def test_changes_with_changes(tmp_path: Path) -> None:
    """TestChangesWithChanges: a whiteout, a modified file and a new file in a subfolder."""
    old = sample(tmp_path / "old")
    rw = tmp_path / "rw"
    write(rw / "dir1/.wh.file1-2")
    write(rw / "dir1/file1-1", "longer than before")
    write(rw / "dir1/subfolder/newFile", "x")
    assert [str(c) for c in changes_of_upper(str(rw), [str(old)])] == [
        "C /dir1",
        "C /dir1/file1-1",
        "D /dir1/file1-2",
        "C /dir1/subfolder",
        "A /dir1/subfolder/newFile",
    ]


def test_changes_with_changes_gh13590(tmp_path: Path) -> None:
    """TestChangesWithChangesGH13590: a new file lists its parent, a changed one too, once."""
    old = tmp_path / "old"
    write(old / "dir1/dir2/dir3/file.txt", "hello")
    new = copy(old, tmp_path / "new")
    write(new / "dir1/dir2/dir3/file1.txt", "bye")
    assert listed(new, old) == ["C /dir1", "C /dir1/dir2", "C /dir1/dir2/dir3", "A /dir1/dir2/dir3/file1.txt"]
    changed = copy(old, tmp_path / "changed")
    write(changed / "dir1/dir2/dir3/file.txt", "bye bye")
    assert listed(changed, old) == ["C /dir1", "C /dir1/dir2", "C /dir1/dir2/dir3", "C /dir1/dir2/dir3/file.txt"]


def test_changes_dirs_empty(tmp_path: Path) -> None:
    """TestChangesDirsEmpty"""
    old = sample(tmp_path / "old")
    assert listed(copy(old, tmp_path / "new"), old) == []


def mutate(root: Path) -> None:
    shutil.rmtree(root / "dir1")
    shutil.rmtree(root / "dir2")
    write(root / "dir2", "a file now")
    (root / "dirnew").mkdir()
    (root / "file1").unlink()
    write(root / "file2", "rewritten and longer")
    (root / "file3").unlink()
    write(root / "file3", "replaced")
    os.utime(root / "file4", (5000, 5000))
    (root / "file5").unlink()
    (root / "file5").mkdir()
    write(root / "filenew", "x")
    (root / "symlink1").unlink()
    (root / "symlink2").unlink()
    os.symlink("other target", root / "symlink2")
    os.symlink("new target", root / "symlinknew")
    os.utime(root / "dir3", (5000, 5000))


def test_changes_dirs_mutated(tmp_path: Path) -> None:
    """TestChangesDirsMutated"""
    old = sample(tmp_path / "old")
    new = copy(old, tmp_path / "new")
    mutate(new)
    assert listed(new, old) == [
        "D /dir1",
        "C /dir2",
        "A /dirnew",
        "D /file1",
        "C /file2",
        "C /file3",
        "C /file4",
        "C /file5",
        "A /filenew",
        "D /symlink1",
        "C /symlink2",
        "A /symlinknew",
    ]


def test_everything_is_added_to_no_parent(tmp_path: Path) -> None:
    new = sample(tmp_path / "new")
    lines = listed(new, None)
    assert all(line.startswith("A ") for line in lines)
    assert len(lines) == sum(len(d) + len(f) for _, d, f in os.walk(new))


@pytest.mark.parametrize(
    ("new_ns", "old_ns", "different"),
    [
        (5_000_000_001, 5_000_000_001, False),
        (5_000_000_001, 5_000_000_002, True),
        (5_000_000_001, 5_000_000_000, False),
        (5_000_000_000, 5_999_999_999, False),
        (5_000_000_000, 6_000_000_000, True),
        (-1, -1_000_000_000, False),
        (-1, 0, True),
    ],
)
def test_sub_second_rule(tmp_path: Path, new_ns: int, old_ns: int, different: bool) -> None:
    for name, ns in (("new", new_ns), ("old", old_ns)):
        write(tmp_path / name / "file", "x")
        os.utime(tmp_path / name / "file", ns=(ns, ns))
    assert listed(tmp_path / "new", tmp_path / "old") == (["C /file"] if different else [])


def test_owner_mode_device_and_capability_count(tmp_path: Path) -> None:
    old = tmp_path / "old"
    for name in ("mode", "uid", "gid", "cap", "same"):
        write(old / name, "x", mtime=1000)
    os.mknod(old / "dev", 0o020600, os.makedev(1, 3))
    new = copy(old, tmp_path / "new")
    (new / "mode").chmod(0o4644)
    os.chown(new / "uid", 7, -1)
    os.chown(new / "gid", -1, 7)
    os.setxattr(new / "cap", "security.capability", b"\1\0\0\2" + b"\x01" + b"\0" * 15)
    mtime = os.lstat(old / "dev").st_mtime_ns
    (new / "dev").unlink()
    os.mknod(new / "dev", 0o020600, os.makedev(1, 5))
    os.utime(new / "dev", ns=(mtime, mtime))
    os.setxattr(new / "same", "user.note", b"x")
    assert listed(new, old) == ["C /cap", "C /dev", "C /gid", "C /mode", "C /uid"]
    with_xattrs = [str(c) for c in changes_of_trees(str(new), str(old), all_xattrs=True)]
    assert "C /same" in with_xattrs


def test_same_inode_is_not_looked_into(tmp_path: Path) -> None:
    sample(tmp_path / "old")
    (tmp_path / "new").mkdir()
    for name in os.listdir(tmp_path / "old"):
        if not (tmp_path / "old" / name).is_dir():
            os.link(tmp_path / "old" / name, tmp_path / "new" / name, follow_symlinks=False)
    assert listed(tmp_path / "new", tmp_path / "old") == ["D /dir1", "D /dir2", "D /dir3"]


def test_retargeted_symlink_of_equal_length(tmp_path: Path) -> None:
    """moby#31805, which moby itself misses."""
    for name, target in (("new", "abc"), ("old", "xyz")):
        (tmp_path / name).mkdir()
        os.symlink(target, tmp_path / name / "link")
        os.utime(tmp_path / name / "link", (1000, 1000), follow_symlinks=False)
    assert listed(tmp_path / "new", tmp_path / "old") == ["C /link"]


def test_names_are_taken_literally(tmp_path: Path) -> None:
    write(tmp_path / "new/.wh.x", "")
    write(tmp_path / "old/x", "")
    assert listed(tmp_path / "new", tmp_path / "old") == ["A /.wh.x", "D /x"]


def test_changes_size(tmp_path: Path) -> None:
    """TestChangesSize, TestChangesSizeWithNoChanges, TestChangesSizeWithOnlyDeleteChanges"""
    old, new = tmp_path / "old", tmp_path / "new"
    write(old / "changed", "12345")
    write(old / "gone", "1234")
    write(new / "added", "123")
    write(new / "changed", "abc")
    assert size_of(changes_of_trees(str(new), str(old))) == 6
    assert size_of([]) == 0
    (new / "added").unlink()
    (new / "changed").unlink()
    assert size_of(changes_of_trees(str(new), str(old))) == 0


def test_changes_size_with_hardlinks(tmp_path: Path) -> None:
    """TestChangesSizeWithHardlinks: 100 files of 4 bytes, each with further names, count once."""
    new = tmp_path / "new"
    for i in range(100):
        write(new / f"file-{i}", "fooo")
        os.link(new / f"file-{i}", new / f"link-{i}")
    (tmp_path / "old").mkdir()
    assert size_of(changes_of_trees(str(new), str(tmp_path / "old"))) == 400
