"""containerd's conformance suite for snapshotters, written anew: each test by its name in core/snapshots/testsuite.

Every test runs on the Python object and through gRPC on a unix socket. ``docs/containerd.md`` has the list of names.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engines.snapshotter_rig import (
    ROOTED,
    Change,
    all_of,
    assert_trees_agree,
    check_snapshots,
    directory,
    file,
    gone,
    linked,
    mounted,
    owner,
    renamed,
    snapshotter_at,
)
from tests.support.sandbox import needs_root
from unionfs.engines.snapshotter import Kind, Snapshotter
from unionfs.errors import (
    SnapshotArgumentError,
    SnapshotExistsError,
    SnapshotNotFoundError,
    SnapshotStateError,
    SnapshotterError,
)

needs_root()

# Names of containerd's suite (SnapshotterSuite in testsuite.go), its own spelling kept, and the tests here.
SUITE = {
    "Basic": "test_basic",
    "StatActive": "test_stat_active",
    "StatComitted": "test_stat_committed",
    "TransitivityTest": "test_transitivity",
    "PreareViewFailingtest": "test_prepare_and_view_with_a_key_that_is_taken",
    "Update": "test_update",
    "Remove": "test_remove",
    "Walk": "test_walk",
    "LayerFileupdate": "test_layer_file_update",
    "RemoveDirectoryInLowerLayer": "test_remove_directory_in_lower_layer",
    "Chown": "test_chown",
    "DirectoryPermissionOnCommit": "test_directory_permission_on_commit",
    "RemoveIntermediateSnapshot": "test_remove_intermediate_snapshot",
    "DeletedFilesInChildSnapshot": "test_deleted_files_in_child_snapshot",
    "MoveFileFromLowerLayer": "test_move_file_from_lower_layer",
    "ViewReadonly": "test_view_readonly",
    "StatInWalk": "test_stat_in_walk",
    "CloseTwice": "test_close_twice",
    "RootPermission": "test_root_permission",
    "Rename": "test_rename",
    "128LayersMount": "test_128_layers_mount",
}


@pytest.fixture(params=["object", "socket"])
def sn(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Snapshotter]:
    with snapshotter_at(tmp_path, request.param) as made:
        yield made


@pytest.fixture
def work(tmp_path: Path) -> Path:
    path = tmp_path / "work"
    path.mkdir()
    return path


def make_base(sn: Snapshotter, work: Path, name: str = "base") -> str:
    """A committed snapshot with one file."""
    with mounted(sn.prepare(f"{name}-active", "", ROOTED), work / "mnt") as here:
        file("foo", "foo\n")(here)
    sn.commit(name, f"{name}-active", ROOTED)
    return name


def make_six(sn: Snapshotter) -> dict[str, tuple[Kind, str]]:
    """Two committed snapshots, two active ones, two views; each kind with and without a parent."""
    sn.prepare("c1-a", "", ROOTED)
    sn.commit("c1", "c1-a", ROOTED)
    sn.prepare("c2-a", "c1", ROOTED)
    sn.commit("c2", "c2-a", ROOTED)
    sn.prepare("a1", "c2", ROOTED)
    sn.prepare("a2", "", ROOTED)
    sn.view("v1", "c2", ROOTED)
    sn.view("v2", "", ROOTED)
    return {
        "c1": (Kind.COMMITTED, ""),
        "c2": (Kind.COMMITTED, "c1"),
        "a1": (Kind.ACTIVE, "c2"),
        "a2": (Kind.ACTIVE, ""),
        "v1": (Kind.VIEW, "c2"),
        "v2": (Kind.VIEW, ""),
    }


def test_basic(sn: Snapshotter, work: Path) -> None:
    first = all_of(file("foo", "foo\n", 0o777), directory("a"), directory("a/b"), directory("a/b/c"))
    second = all_of(file("bar", "bar\n", 0o777), file("foo", "bar\n", 0o777), gone("a/b"))
    flat = work / "flat"
    flat.mkdir()

    key = f"{work}/preparing"  # keys may look like paths
    with mounted(sn.prepare(key, "", ROOTED), work / "mnt") as here:
        first(here)
    sn.commit(f"{work}/committed", key, ROOTED)
    one = sn.stat(f"{work}/committed")
    assert (one.parent, one.kind) == ("", Kind.COMMITTED)
    with pytest.raises(SnapshotNotFoundError):
        sn.stat(key)

    first(str(flat))
    with mounted(sn.prepare("next", one.name, ROOTED), work / "mnt") as here:
        assert_trees_agree(here, flat)
        second(here)
    active = sn.stat("next")
    assert (active.parent, active.kind) == (one.name, Kind.ACTIVE)
    sn.commit("committed next", "next", ROOTED)
    two = sn.stat("committed next")
    assert (two.parent, two.kind) == (one.name, Kind.COMMITTED)
    with pytest.raises(SnapshotNotFoundError):
        sn.stat("next")
    assert {info.name: info for info in sn.walk()} == {one.name: one, two.name: two}

    second(str(flat))
    with mounted(sn.view("look", two.name, ROOTED), work / "mnt") as here:
        assert_trees_agree(here, flat)
    sn.remove("look")
    with pytest.raises(SnapshotStateError, match="remove"):
        sn.remove(one.name)
    sn.remove(two.name)
    sn.remove(one.name)
    assert sn.walk() == []


def test_stat_active(sn: Snapshotter, work: Path) -> None:
    with mounted(sn.prepare("preparing", "", ROOTED), work / "mnt") as here:
        file("foo", "foo\n")(here)
        info = sn.stat("preparing")
    assert (info.name, info.kind, info.parent, info.labels) == ("preparing", Kind.ACTIVE, "", ROOTED)


def test_stat_committed(sn: Snapshotter, work: Path) -> None:
    # As in containerd's: it is still mounted when it is committed.
    with mounted(sn.prepare("preparing", "", ROOTED), work / "mnt") as here:
        file("foo", "foo\n")(here)
        sn.commit("committed", "preparing", ROOTED)
        info = sn.stat("committed")
    assert (info.name, info.kind, info.parent, info.labels) == ("committed", Kind.COMMITTED, "", ROOTED)


def test_transitivity(sn: Snapshotter, work: Path) -> None:
    make_base(sn, work, "a")
    with mounted(sn.prepare("next", "a", ROOTED), work / "mnt") as here:
        file("foo", "foo bar\n")(here)
    sn.commit("b", "next", ROOTED)
    assert sn.stat("a").parent == ""
    assert sn.stat("b").parent == "a"
    assert sn.stat(sn.stat("b").parent).parent == ""


def test_prepare_and_view_with_a_key_that_is_taken(sn: Snapshotter, work: Path) -> None:
    make_base(sn, work, "a")
    sn.prepare("one", "a", ROOTED)
    sn.view("two", "a", ROOTED)
    for key in ("one", "two", "a"):
        for make in (sn.prepare, sn.view):
            with pytest.raises(SnapshotExistsError):
                make(key, "a", ROOTED)
    # The names of keys and of committed snapshots are one space.
    with pytest.raises(SnapshotExistsError):
        sn.commit("two", "one")
    with pytest.raises(SnapshotArgumentError):
        sn.prepare("over an active one", "one")
    with pytest.raises(SnapshotNotFoundError):
        sn.view("over nothing that is there", "gone")
    with pytest.raises(SnapshotStateError):
        sn.commit("b", "two")
    with pytest.raises(SnapshotStateError):
        sn.mounts("a")


def test_update(sn: Snapshotter) -> None:
    before = time.time_ns()
    six = make_six(sn)
    after = time.time_ns()
    for name, (kind, parent) in six.items():
        made = sn.stat(name)
        assert before <= made.created_ns <= after
        assert made.created_ns == made.updated_ns
        assert (made.name, made.kind, made.parent) == (name, kind, parent)

        labels = {"l1": "v1", "l2": "v2", "l3": "v3", **ROOTED}
        from_ns = time.time_ns()
        info = sn.update(name, labels)
        assert from_ns <= info.updated_ns <= time.time_ns()
        assert (info.name, info.kind, info.parent, info.created_ns) == (name, kind, parent, made.created_ns)
        assert info.labels == labels

        # Only what the fields name changes; what has no new value goes.
        info = sn.update(name, {"l1": "updated", "l4": "v4"}, ["labels.l1", "labels.l2"])
        assert info.labels == {"l1": "updated", "l3": "v3", **ROOTED}
        info = sn.update(name, {"l4": "v4", **ROOTED}, ["labels"])
        assert info.labels == {"l4": "v4", **ROOTED}
        with pytest.raises(SnapshotArgumentError):
            sn.update(name, {}, ["parent"])
        assert sn.stat(name) == info


def test_remove(sn: Snapshotter) -> None:
    sn.prepare("active", "", ROOTED)
    sn.commit("committed", "active", ROOTED)
    sn.prepare("again", "committed", ROOTED)
    sn.remove("again")
    sn.view("again", "committed", ROOTED)
    sn.remove("again")
    sn.prepare("again", "", ROOTED)
    sn.remove("committed")
    sn.commit("committed", "again", ROOTED)
    assert [info.name for info in sn.walk()] == ["committed"]
    with pytest.raises(SnapshotNotFoundError):
        sn.remove("again")


def test_walk(sn: Snapshotter) -> None:
    root = {"containerd.io/gc.root": "check-walk"}
    sn.prepare("a-np", "", root)
    sn.prepare("p-tmp", "", root)
    sn.commit("p", "p-tmp", root)
    sn.prepare("a", "p", root)
    sn.view("v", "p", root)
    sn.prepare("p-wl-tmp", "", root)
    sn.commit("p-wl", "p-wl-tmp", {"l": "1", **root})
    sn.prepare("a-wl", "p-wl", {"l": "2", **root})
    sn.view("v-wl", "p-wl", {"l": "3", **root})
    sn.prepare("a-np-wl", "", {"l": "2", **root})
    rooted = 'labels."containerd.io/gc.root"==check-walk'
    cases: list[tuple[list[str], str]] = [
        ([rooted], "a a-np a-np-wl a-wl p p-wl v v-wl"),
        ([f"kind==active,{rooted}"], "a a-np a-np-wl a-wl"),
        ([f"kind==view,{rooted}"], "v v-wl"),
        ([f"kind==committed,{rooted}"], "p p-wl"),
        ([f"kind!=active,{rooted}"], "p p-wl v v-wl"),
        (["parent==p"], "a v"),
        (["parent!=p", "kind==view"], "a-np a-np-wl a-wl p p-wl v v-wl"),
        (["parent"], "a a-np a-np-wl a-wl p p-wl v v-wl"),  # the field is there, also when it is empty
        (['parent==""'], "a-np a-np-wl p p-wl"),
        (["labels.l"], "a-np-wl a-wl p-wl v-wl"),
        (["labels.l==2"], "a-np-wl a-wl"),
        (["labels.l!=2,labels.l"], "p-wl v-wl"),
        (["labels.l~=^[12]$,kind==active", "name==v"], "a-np-wl a-wl v"),
        (["name~=/^a-/"], "a-np a-np-wl a-wl"),
        (["labels.none"], ""),
        ([], "a a-np a-np-wl a-wl p p-wl v v-wl"),
    ]
    for filters, names in cases:
        assert [info.name for info in sn.walk(filters)] == names.split(), filters


def test_layer_file_update(sn: Snapshotter, work: Path) -> None:
    first = all_of(
        directory("etc", 0o700), file("etc/hosts", "mydomain 10.0.0.1"), file("etc/profile", "PATH=/usr/bin")
    )
    second = all_of(
        file("etc/hosts", "mydomain 10.0.0.2"),
        file("etc/profile", "PATH=/usr/bin", 0o666),
        directory("root", 0o700),
        file("root/.bashrc", "PATH=/usr/sbin:/usr/bin"),
    )
    # Five times, as containerd's, since what it looks for depended on the second it was done in.
    for _ in range(5):
        check_snapshots(sn, work, first, second)


def test_remove_directory_in_lower_layer(sn: Snapshotter, work: Path) -> None:
    check_snapshots(
        sn,
        work,
        all_of(directory("lib", 0o700), file("lib/hidden", "")),
        all_of(gone("lib"), directory("lib", 0o700), file("lib/not-hidden", "")),
        file("lib/newfile", ""),
    )


def test_chown(sn: Snapshotter, work: Path) -> None:
    paths = ["opt", "opt/a", "opt/a/b"]
    check_snapshots(
        sn,
        work,
        all_of(*(directory(path, 0o700) for path in paths), file("opt/a/b/file.txt", "hello")),
        all_of(*(owner(path, 1, 1) for path in [*paths, "opt/a/b/file.txt"])),
    )


def test_directory_permission_on_commit(sn: Snapshotter, work: Path) -> None:
    given = [owner(path, 1, 1) for path in ("dir1", "dir2", "dir3", "dir5", "dir5/f1")]
    check_snapshots(
        sn,
        work,
        all_of(
            *(directory(f"dir{number}", 0o700) for number in range(1, 6)),
            file("dir4/f1", "..."),
            file("dir5/f1", "..."),
            *given,
        ),
        all_of(owner("dir2", 0, 0), gone("dir3"), owner("dir4", 1, 1), owner("dir4/f1", 1, 1)),
        all_of(
            directory("dir3", 0o700),
            owner("dir3", 1, 1),
            gone("dir5"),
            directory("dir5", 0o700),
            owner("dir5", 1, 1),
        ),
    )


def test_remove_intermediate_snapshot(sn: Snapshotter, work: Path) -> None:
    make_base(sn, work)
    sn.prepare("intermediate", "base", ROOTED)
    sn.commit("committed", "intermediate", ROOTED)
    sn.prepare("top", "committed", ROOTED)
    for name in ("committed", "base"):
        with pytest.raises(SnapshotStateError):
            sn.remove(name)
    for name in ("top", "committed", "base"):
        sn.remove(name)


def test_deleted_files_in_child_snapshot(sn: Snapshotter, work: Path) -> None:
    nothing: Change = all_of()
    check_snapshots(sn, work, all_of(file("foo", "foo\n"), file("foobar", "foobar\n")), gone("foobar"), nothing)


def test_move_file_from_lower_layer(sn: Snapshotter, work: Path) -> None:
    check_snapshots(
        sn,
        work,
        all_of(directory("dir1", 0o700), file("dir1/f1", "Hello"), directory("dir2", 0o700), file("dir2/f2", "...")),
        all_of(
            directory("dir3", 0o700),
            file("dir3/f1", "Hello"),
            gone("dir1"),
            linked("dir2/f2", "dir3/f2"),
            gone("dir2/f2"),
        ),
    )


@pytest.mark.parametrize("layers", [0, 1, 2])
def test_view_readonly(sn: Snapshotter, work: Path, layers: int) -> None:
    parent = ""
    for number in range(layers):
        sn.prepare("preparing", parent, ROOTED)
        parent = f"committed {number}"
        sn.commit(parent, "preparing", ROOTED)
    with mounted(sn.view("view", parent, ROOTED), work / "mnt") as here, pytest.raises(OSError, match="Read-only"):
        file("testfile", "testcontent")(here)
    sn.remove("view")


def test_stat_in_walk(sn: Snapshotter) -> None:
    make_six(sn)
    for info in sn.walk():
        assert sn.stat(info.name) == info


def test_close_twice(tmp_path: Path) -> None:
    # Only the object: whose connection is closed is not told to the service.
    with snapshotter_at(tmp_path, "object") as sn:
        sn.prepare("active", "", ROOTED)
        sn.commit("committed", "active", ROOTED)
        sn.remove("committed")
        sn.cleanup()
        sn.close()
        sn.close()
        with pytest.raises(SnapshotterError):
            sn.walk()


def test_root_permission(sn: Snapshotter, work: Path) -> None:
    mask = os.umask(0o077)
    try:
        with mounted(sn.prepare("preparing", "", ROOTED), work / "mnt") as here:
            assert os.stat(here).st_mode & 0o777 == 0o755
        sn.commit("committed", "preparing", ROOTED)
        with mounted(sn.prepare("over it", "committed", ROOTED), work / "mnt") as here:
            assert os.stat(here).st_mode & 0o777 == 0o755
    finally:
        os.umask(mask)


def test_rename(sn: Snapshotter, work: Path) -> None:
    check_snapshots(
        sn,
        work,
        all_of(
            directory("dir1", 0o700),
            directory("somefiles", 0o700),
            file("somefiles/f1", "was here first!"),
            file("somefiles/f2", "nothing interesting"),
        ),
        all_of(
            # containerd leaves this line out for its own overlayfs and for fuse-overlayfs, which refuse it.
            renamed("dir1", "dir2"),
            file("somefiles/f1-overwrite", "new content 1"),
            renamed("somefiles/f1-overwrite", "somefiles/f1"),
            renamed("somefiles/f2", "somefiles/f3"),
        ),
        file("dir2/after", "it is still a directory"),
    )


def test_128_layers_mount(sn: Snapshotter, work: Path, request: pytest.FixtureRequest) -> None:
    """Layers as a client unpacks them that mounts the overlay; on the object every fourth as a container writes."""
    stride = 4 if "object" in request.node.name else 128  # a server takes a while to start
    flat = work / "flat"
    flat.mkdir()
    changes = [
        all_of(
            file("bottom", "way at the bottom\n", 0o777),
            file("overwriteme", "FIRST!\n", 0o777),
            directory("addhere"),
            directory("onlyme"),
            file("onlyme/bottom", "bye!\n", 0o777),
        )
    ]
    changes += [
        all_of(
            file("overwriteme", f"{number} WAS HERE!\n", 0o777),
            file(f"addhere/file-{number}", "same\n", 0o755),
            gone("onlyme"),
            directory("onlyme"),
            file(f"onlyme/file-{number}", "only me!\n", 0o777),
        )
        for number in range(1, 128)
    ]
    parent = ""
    for number, change in enumerate(changes):
        unpacking = number % stride != 0
        key = f"ns/{number}/extract-{number} sha256:{number:064x}" if unpacking else f"layer {number}"
        mounts = sn.prepare(key, parent, ROOTED)
        assert mounts[0].type == ("overlay" if unpacking else "bind")
        with mounted(mounts, work / "mnt") as here:
            if number % 16 == 0:
                assert_trees_agree(here, flat)
            change(here)
            change(str(flat))
        parent = f"committed {number}"
        sn.commit(parent, key, ROOTED)
    with mounted(sn.view("view", parent, ROOTED), work / "mnt") as here:
        assert_trees_agree(here, flat)
    with mounted(sn.prepare("container", parent, ROOTED), work / "mnt") as here:
        assert_trees_agree(here, flat)


def test_the_guide_lists_the_suite(repository: Path) -> None:
    listed = dict(
        re.findall(
            r"^\| `([A-Za-z0-9]+)` \| `(test_[a-z0-9_]+)` \|", (repository / "docs/containerd.md").read_text(), re.M
        )
    )
    assert listed == SUITE
    assert all(name in globals() for name in SUITE.values())
