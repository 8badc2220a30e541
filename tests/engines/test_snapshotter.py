"""The snapshotter beyond containerd's suite: filters, labels, sizes, lost servers, crashes, bad input."""

from __future__ import annotations

import errno
import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from tests.engines.snapshotter_client import SnapshotterClient
from tests.engines.snapshotter_rig import file, mounted, mounts_below, remove_all, snapshotter_at, tree
from tests.layers.dying import run_and_kill, run_and_watch
from tests.support.mounts import mounted_image, servers_of, take_down, wait_until
from tests.support.sandbox import needs_root
from tests.support.syscalls import MNT_DETACH, mount, umount2
from unionfs.engines.snapshotter import Info, Kind, Snapshotter, UnionSnapshotter
from unionfs.engines.snapshotter.filters import compile_filters
from unionfs.engines.snapshotter.service import SocketServer, make_handler
from unionfs.errors import (
    SnapshotArgumentError,
    SnapshotExistsError,
    SnapshotNotFoundError,
    SnapshotterError,
    StoreLockedError,
)

needs_root()

UNPACK = "default/7/extract-1234-abcd sha256:0123456789abcdef"


@pytest.fixture
def sn(tmp_path: Path) -> Iterator[Snapshotter]:
    with snapshotter_at(tmp_path, "object") as made:
        yield made


def two_layers(sn: Snapshotter) -> str:
    """A committed snapshot over another; returns its name."""
    file("base", "base\n")(sn.prepare("base-active")[0].source)
    sn.commit("base", "base-active")
    file("top", "top\n")(sn.prepare("top-active", "base")[0].source)
    sn.commit("top", "top-active")
    return "top"


# Filters

INFO = Info(
    name="default/1/sha256:ab",
    parent="",
    kind=Kind.COMMITTED,
    created_ns=1,
    updated_ns=1,
    labels={"plain": "1", "a.b/c": "with, comma", "empty": "", "q": 'say "x"'},
)


@pytest.mark.parametrize(
    ("text", "matches"),
    [
        ("", True),
        ("name==default/1/sha256:ab", True),
        ("name!=x", True),
        ("kind==committed", True),
        ("kind==COMMITTED", False),
        ("parent", True),
        ('parent==""', True),
        ("parent==x", False),
        ("parent!=x", True),
        ("labels.plain", True),
        ("labels.empty", True),
        ("labels.none", False),
        ("labels", False),
        ("nonsense", False),
        ("nonsense==x", False),
        ('labels."a.b/c"=="with, comma"', True),
        ('"labels"."plain"==1', True),
        ('labels.q=="say \\"x\\""', True),
        ("name~=sha256:[0-9a-f]+", True),
        ("name~=/1\\/sha/", True),
        ("name~=|^default|,labels.plain==1", True),
        ("name~=^sha", False),
        ("labels.plain==1,kind==view", False),
        ("name~=(?i)SHA256", True),
        ("name~=\\pL", True),
        ("labels.q~=/^(s+)+$/", False),
    ],
)
def test_filter(text: str, matches: bool) -> None:
    assert compile_filters([text])(INFO) is matches


@pytest.mark.parametrize(
    "text", ["==x", "name==", "name=x", "name ==x", 'labels."a', "name==a,", ",", "name==a b", "name~=(", "labels..a"]
)
def test_a_filter_that_cannot_be_understood(text: str) -> None:
    with pytest.raises(SnapshotArgumentError, match=re.escape(repr(text))):
        compile_filters([text])


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("(?=a)", "invalid perl operator"),
        (r"(a)\1", "invalid escape sequence"),
        ("a{1001}", "invalid repetition size"),
        ("(((a{30}){30}){30}){30}", "invalid repetition size|too large"),
        ("(x|y" * 3000, "missing"),
    ],
)
def test_regular_expressions_are_those_of_go(value: str, said: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SnapshotArgumentError, match=f"is no regular expression of RE2 .*{said}") as caught:
        compile_filters([f"name~=/{value}/"])
    assert len(str(caught.value)) < 1000
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("value", ["^(a+)+$", "(a|aa)+$", "(a*)*b", "(.*,){11}P", "^(([a-z])+.)+[A-Z]([a-z])+$"])
def test_no_regular_expression_takes_long(value: str) -> None:
    """Python's own ``re`` takes longer than a person lives."""
    info = replace(INFO, labels={"a": "a" * 4000 + "!"})
    assert not compile_filters([f"labels.a~=/{value}/"])(info)


def test_filters_are_of_some_length() -> None:
    with pytest.raises(SnapshotArgumentError, match="the filters have 16385 bytes; make them at most 16384"):
        compile_filters(["name==" + "a" * 16378, "n"])


def test_one_of_several_filters_is_enough() -> None:
    assert compile_filters(["kind==view", "labels.plain"])(INFO)
    assert not compile_filters(["kind==view", "nothing"])(INFO)
    assert compile_filters([])(replace(INFO, kind=Kind.VIEW))


# What is kept of a snapshot


def test_sizes(sn: Snapshotter) -> None:
    source = sn.prepare("active")[0].source
    empty = sn.usage("active")
    assert empty.inodes == 1
    with open(f"{source}/data", "wb") as out:
        out.write(b"x" * 100_000)
        os.fsync(out.fileno())  # the file system may give it its blocks only then
    os.link(f"{source}/data", f"{source}/same")
    used = sn.usage("active")
    assert used.inodes == 2
    assert 100_000 <= used.size_bytes - empty.size_bytes < 150_000
    sn.commit("committed", "active")
    assert sn.usage("committed") == used
    # What it stands on does not count.
    sn.prepare("over", "committed")
    assert sn.usage("over").inodes == 1


def test_labels(sn: Snapshotter) -> None:
    reference = {"containerd.io/snapshot.ref": "sha256:abc", "containerd.io/gc.root": "now"}
    sn.prepare("active", labels={**reference, "empty": ""})
    assert sn.stat("active").labels == reference
    sn.commit("committed", "active", {"other": "1"})
    assert sn.stat("committed").labels == {"other": "1"}
    with pytest.raises(SnapshotArgumentError, match="label big has 4097 bytes"):
        sn.update("committed", {"big": "x" * 4094})
    with pytest.raises(SnapshotArgumentError):
        sn.prepare("bad", labels={"containerd.io/snapshot/uidmapping": "0:1"})
    with pytest.raises(SnapshotArgumentError):
        sn.prepare("")
    assert [info.name for info in sn.walk()] == ["committed"]


def test_mounts_are_the_same_each_time(sn: Snapshotter) -> None:
    top = two_layers(sn)
    for make, key, parent in (
        (sn.prepare, "a", top),
        (sn.prepare, "b", ""),
        (sn.prepare, UNPACK, top),
        (sn.view, "c", top),
        (sn.view, "d", "base"),
        (sn.view, "e", ""),
    ):
        assert make(key, parent) == sn.mounts(key) == sn.mounts(key)


def test_everything_is_there_after_a_restart(tmp_path: Path) -> None:
    with snapshotter_at(tmp_path, "object") as sn:
        two_layers(sn)
        mounts = sn.prepare("container", "top", {"l": "1"})
        before = sn.walk()
        with mounted(mounts, tmp_path / "mnt") as here, open(f"{here}/held", "w") as held:
            sn.close()
            again = UnionSnapshotter(str(tmp_path / "root"))
            assert again.walk() == before
            assert again.mounts("container") == mounts
            held.write("written across the restart\n")
            held.flush()
            assert Path(mounts[0].source, "held").read_text() == "written across the restart\n"
        remove_all(again)
        again.close()
        assert mounts_below(tmp_path) == []


def test_committed_while_a_program_still_has_it_open(
    sn: Snapshotter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was written before the commit is in it, though the kernel still had it in its memory."""
    monkeypatch.setenv("UNIONFS_TRANSPORT", "pyfuse3")  # the other one writes through
    mounts = sn.prepare("container", two_layers(sn))
    with mounted(mounts, tmp_path / "mnt") as here, open(f"{here}/top", "ab", buffering=0) as held:
        held.write(b"x" * 300_000)
        sn.commit("committed", "container")
        # Right now: the kernel would get to it by itself some time later.
        assert (tmp_path / "root/snapshots/3/fs/top").read_bytes() == b"top\n" + b"x" * 300_000


def marked_copies(fs: Path) -> list[str]:
    """The files of a layer that say that their data is elsewhere."""
    names = ("trusted.overlay.metacopy", "user.overlay.metacopy")
    return [
        path.name
        for path in sorted(fs.rglob("*"))
        if any(name in os.listxattr(path, follow_symlinks=False) for name in names)
    ]


@pytest.mark.parametrize("state", ["idle", "held", "killed", "crashed"])
def test_a_committed_layer_says_of_no_file_that_its_data_is_elsewhere(
    sn: Snapshotter, tmp_path: Path, state: str
) -> None:
    """Copies of ``chown -R`` are synced later, and marked until then; the kernel's overlayfs refuses marked files."""
    top = two_layers(sn)
    mounts = sn.prepare("container", top)
    fs, work = (tmp_path / "root/snapshots/3" / name for name in ("fs", "work"))
    os.chown(f"{mounts[0].source}/base", 1, 1)
    assert marked_copies(fs) == ["base"]
    with ExitStack() as held:
        if state == "held":
            held.enter_context(mounted(mounts, tmp_path / "mnt"))
        if state in ("killed", "crashed"):
            take_down_killed(mounts[0].source)
        if state == "crashed":
            # The power was cut: its data never came to the disk, and nothing is mounted.
            os.truncate(fs / "base", 0)
            os.truncate(fs / "base", 5)
        sn.commit("committed", "container")
        assert marked_copies(fs) == []
        assert (fs / "base").read_bytes() == b"base\n"
        assert (fs / "base").stat().st_uid == 1
    assert wait_until(lambda: not (work / "unsynced").exists(), 30)
    assert mounts_below(tmp_path) == []
    layers = ":".join(str(tmp_path / f"root/snapshots/{number}/fs") for number in (3, 2, 1))
    (tmp_path / "kernel").mkdir()
    mount("overlay", str(tmp_path / "kernel"), "overlay", 0, f"lowerdir={layers},metacopy=off")
    try:
        assert (tmp_path / "kernel/base").read_text() == "base\n"
    finally:
        take_down(str(tmp_path / "kernel"))


def take_down_killed(target: str) -> None:
    """Kill the server of a mount, and unmount what is left."""
    for pid in servers_of(target):
        os.kill(pid, signal.SIGKILL)
    while os.path.ismount(target) or any(target == one for one in mounts_below(Path(target).parent)):
        umount2(target, MNT_DETACH)


_IN_USER_NAMESPACE = """
import os, sys
from unionfs.engines.snapshotter import UnionSnapshotter
sn = UnionSnapshotter(sys.argv[1])
os.mkdir(sn.prepare("one")[0].source + "/d")
open(sn.mounts("one")[0].source + "/d/f", "w").close()
sn.commit("base", "one")
mounts = sn.prepare(sys.argv[2], "base")
print(mounts[0].type)
os.unlink(mounts[0].source + "/d/f")
os.rmdir(mounts[0].source + "/d")
os.mkdir(mounts[0].source + "/d")
sn.commit("top", sys.argv[2])
print(os.listdir(sn.view("look", "top")[0].source + "/d"))
for name in ("look", "top", "base"):
    sn.remove(name)
sn.cleanup()
print(os.listdir(sys.argv[1] + "/snapshots"))
"""


def test_in_a_user_namespace(tmp_path: Path) -> None:
    words = ["unshare", "--user", "--map-root-user", "--mount", sys.executable, "-c", _IN_USER_NAMESPACE]
    done = subprocess.run([*words, tmp_path / "root", UNPACK], capture_output=True, text=True, timeout=60, check=False)
    # There an overlay cannot be written to behind its back: the applier's whiteouts need privileges.
    assert done.stdout == "bind\n[]\n[]\n", done.stderr


def test_a_second_one_is_refused(sn: Snapshotter, tmp_path: Path) -> None:
    with pytest.raises(StoreLockedError, match="in use by this process"):
        UnionSnapshotter(str(tmp_path / "root"))


def test_a_mount_whose_server_was_killed_is_made_again(sn: Snapshotter) -> None:
    two_layers(sn)
    (mount,) = sn.prepare("container", "top")
    file("kept", "kept\n")(mount.source)
    fd = os.open(mount.source, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)
    for pid in servers_of(mount.source):
        os.kill(pid, signal.SIGKILL)

    def dead() -> bool:
        try:
            os.statvfs(mount.source)
        except OSError:
            return True
        return False

    assert wait_until(dead, 30)
    assert sn.mounts("container") == (mount,)
    assert sorted(os.listdir(mount.source)) == ["base", "kept", "top"]
    # It can also be committed and removed when it is dead.
    for pid in servers_of(mount.source):
        os.kill(pid, signal.SIGKILL)
    assert wait_until(dead, 30)
    sn.commit("committed", "container")
    assert sorted(os.listdir(sn.view("look", "committed")[0].source)) == ["base", "kept", "top"]


def test_a_lost_mount_is_made_again(sn: Snapshotter) -> None:
    """As after the machine was started anew."""
    two_layers(sn)
    (mount,) = sn.prepare("container", "top")
    assert take_down(mount.source, servers_of(mount.source)) == []
    os.rmdir(mount.source)
    assert os.listdir(sn.mounts("container")[0].source) != []


def test_a_mount_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with snapshotter_at(tmp_path, "object") as sn:
        two_layers(sn)
    bad = UnionSnapshotter(str(tmp_path / "root"), ["lowerdir=/nonexistent"])
    file("base", "base\n")(bad.prepare("base-active")[0].source)
    bad.commit("base", "base-active")
    for make in (bad.prepare, bad.view):
        with pytest.raises(SnapshotterError, match="option lowerdir is given twice"):
            make("container", "base", {"containerd.io/snapshot/uidmapping": "0:1:1"})
        assert [info.name for info in bad.walk()] == ["base"]
    bad.cleanup()
    assert os.listdir(tmp_path / "root/snapshots") == ["1"]
    bad.close()


# Unpacking without a mount


def test_layers_are_unpacked_without_a_mount(sn: Snapshotter, tmp_path: Path) -> None:
    top = two_layers(sn)
    (mount,) = sn.prepare(UNPACK, top)
    options = dict(word.partition("=")[::2] for word in mount.options)
    assert (mount.type, mount.source) == ("overlay", "overlay")
    assert sorted(options) == ["index", "lowerdir", "upperdir", "workdir"]
    assert [os.listdir(path) for path in options["lowerdir"].split(":")] == [["top"], ["base"]]
    assert mounts_below(tmp_path) == []
    # As containerd's applier writes.
    file("new", "new\n")(options["upperdir"])
    os.mknod(f"{options['upperdir']}/base", 0o20000, 0)
    sn.commit("unpacked", UNPACK)
    assert sorted(tree(sn.view("look", "unpacked")[0].source)) == [".", "new", "top"]


@pytest.mark.parametrize("key", ["container", "extract-1", "default/1/not-extract-1 sha256:ab", "extract-1 x"])
def test_other_keys_are_mounted(sn: Snapshotter, key: str) -> None:
    assert sn.prepare(key, two_layers(sn))[0].type == "bind"


def test_the_short_cut_can_be_turned_off(tmp_path: Path) -> None:
    with snapshotter_at(tmp_path, "object", overlay_unpack=False) as sn:
        assert sn.prepare(UNPACK, two_layers(sn))[0].type == "bind"


@pytest.mark.parametrize("over", ["object", "socket"])
def test_a_layer_that_is_there_is_not_unpacked_again(over: str, tmp_path: Path) -> None:
    """As containerd asks for two of its namespaces."""
    a, b = "sha256:aa", "sha256:bb"
    ref = "containerd.io/snapshot.ref"
    with snapshotter_at(tmp_path, over, share_layers=True) as sn:
        sn.prepare(f"one/1/extract-1-x {a}", labels={ref: a})
        sn.commit(f"one/2/{a}", f"one/1/extract-1-x {a}", {ref: a})
        # As containerd 1.6 imports an image: the layer is only in the key.
        sn.prepare(f"one/3/extract-1-x {b}", f"one/2/{a}")
        sn.commit(f"one/4/{b}", f"one/3/extract-1-x {b}")
        for layer, parent, name in ((a, "", f"one/2/{a}"), (b, f"one/2/{a}", f"one/4/{b}")):
            with pytest.raises(SnapshotExistsError, match=name):
                sn.prepare(f"two/1/extract-2-x {layer}", parent, {ref: layer})
            (found,) = sn.walk([f'labels."{ref}"=={layer},parent=="{parent}"'])
            assert (found.name, found.kind) == (name, Kind.COMMITTED)
        # Over another parent it is another layer, and one that is not asked for by its label is made.
        sn.prepare(f"two/2/extract-2-x {b}", "", {ref: b})
        sn.prepare(f"two/3/extract-2-x {b}", f"one/2/{a}")
    with snapshotter_at(tmp_path / "separate", over) as sn:
        for namespace in ("one", "two"):
            sn.prepare(f"{namespace}/1/extract-1-x {a}", labels={ref: a})
            sn.commit(f"{namespace}/2/{a}", f"{namespace}/1/extract-1-x {a}", {ref: a})


def test_over_a_renamed_directory_layers_are_unpacked_through_a_mount(sn: Snapshotter) -> None:
    source = sn.prepare("one")[0].source
    os.mkdir(f"{source}/old")
    os.mkdir(f"{source}/old/sub", 0o700)
    sn.commit("base", "one")
    source = sn.prepare("two", "base")[0].source
    os.rename(f"{source}/old", f"{source}/new")
    sn.commit("renamed", "two")
    assert sn.prepare(UNPACK, "renamed")[0].type == "bind"
    sn.prepare("three", "renamed")
    sn.commit("over it", "three")
    assert sn.prepare(UNPACK + "0", "over it")[0].type == "bind"
    assert os.stat(f"{sn.mounts(UNPACK)[0].source}/new/sub").st_mode & 0o777 == 0o700


# What labels ask for


@pytest.mark.parametrize("parent", ["", "base", "top"])
def test_a_limit_of_size(sn: Snapshotter, parent: str) -> None:
    two_layers(sn)
    (mount,) = sn.prepare("limited", parent, {"containerd.io/snapshot/max-size": str(1 << 20)})
    with open(f"{mount.source}/big", "wb", buffering=0) as big, pytest.raises(OSError) as caught:
        for _ in range(100):
            big.write(b"x" * 65536)
            os.fsync(big.fileno())
    assert caught.value.errno in (errno.ENOSPC, errno.EDQUOT)
    with pytest.raises(SnapshotArgumentError, match="no size"):
        sn.prepare("other", parent, {"containerd.io/snapshot/max-size": "1G"})


def test_shifted_ids(sn: Snapshotter) -> None:
    source = sn.prepare("active")[0].source
    file("f", "f\n")(source)
    os.chown(f"{source}/f", 7, 8)
    sn.commit("base", "active")
    shift = {
        "containerd.io/snapshot/uidmapping": "0:100000:65536",
        "containerd.io/snapshot/gidmapping": "0:5:1,8:900:9",
    }
    for make in (sn.prepare, sn.view):
        (mount,) = make("key", "base", shift)
        info = os.stat(f"{mount.source}/f")
        assert (info.st_uid, info.st_gid) == (100007, 900)
        sn.remove("key")


# Many at once


def test_a_parent_that_is_replaced_while_a_snapshot_is_made_over_it(
    sn: Snapshotter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is mounted and what the database says must not be of two parents of the same name."""
    two_layers(sn)
    assert isinstance(sn, UnionSnapshotter)
    create = sn._directories.create

    def replaced(parents: Sequence[int]) -> int:
        monkeypatch.undo()
        number = create(parents)
        sn.remove("top")
        file("other", "other\n")(sn.prepare("again", "base")[0].source)
        sn.commit("top", "again")
        return number

    monkeypatch.setattr(sn._directories, "create", replaced)
    with pytest.raises(SnapshotterError, match="parent snapshot top was replaced meanwhile; try again"):
        sn.prepare("container", "top")
    assert [info.name for info in sn.walk()] == ["base", "top"]
    assert mounts_below(tmp_path) == []
    assert sorted(os.listdir(sn.prepare("container", "top")[0].source)) == ["base", "other"]


def test_calls_from_many_threads(sn: Snapshotter) -> None:
    top = two_layers(sn)
    barrier = threading.Barrier(8)

    def make(number: int) -> bool:
        barrier.wait(60)
        try:
            sn.prepare("same", top)
            return True
        except SnapshotterError:
            return False

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(make, range(8))) == 1

    def life(number: int) -> None:
        source = sn.prepare(f"k{number}", top)[0].source
        file(f"f{number}", "x")(source)
        sn.commit(f"c{number}", f"k{number}")
        assert sorted(os.listdir(sn.view(f"v{number}", f"c{number}")[0].source)) == ["base", f"f{number}", "top"]
        sn.remove(f"v{number}")
        sn.remove(f"c{number}")
        sn.cleanup()

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(life, range(12)))
    assert [info.name for info in sn.walk()] == ["base", "same", "top"]


def test_through_the_socket(tmp_path: Path) -> None:
    store = UnionSnapshotter(str(tmp_path / "root"))
    server = SocketServer(str(tmp_path / "socket"), make_handler(store))
    server.start()
    client = SnapshotterClient(server.path)
    try:
        for number in range(101):
            store.view(f"v{number:03}", labels={"number": str(number)})
        assert [info.labels["number"] for info in client.walk()] == [str(number) for number in range(101)]
        assert client.messages == 1
        assert client.walk(["name==none"]) == []
        with pytest.raises(SnapshotArgumentError, match="a field name is expected"):
            client.walk(["=="])
        store.prepare("a")
        with pytest.raises(SnapshotArgumentError, match="rebase"):
            client.commit("b", "a", parent="v000")
        client.commit("b", "a", parent="")
        with pytest.raises(SnapshotNotFoundError, match="snapshot none does not exist"):
            client.stat("none")
    finally:
        client.close()
        server.stop(5)
        store.close()


# Crashes and full disks


def live(root: str, confirmed: Callable[[str], None] = lambda name: None) -> None:
    """What is ended at each of its steps: everything that changes a store. ``confirmed`` is told what is promised."""
    sn = UnionSnapshotter(root)
    remove_all(sn)
    file("base", "base\n")(sn.prepare("base-active")[0].source)
    sn.commit("base", "base-active")
    confirmed("base")
    file("top", "top\n")(sn.prepare("top-active", "base")[0].source)
    sn.commit("top", "top-active")
    confirmed("top")
    sn.prepare("container", "top")
    confirmed("container")
    sn.update("top", {"a": "b"})
    confirmed("label")
    confirmed("removing")
    sn.remove("container")
    confirmed("removed")
    sn.cleanup()
    sn.close()


def look(root: str, why: str) -> list[Info]:
    """Open a store after its death: it has complete snapshots, and nothing else is on disk. Returns what is there."""
    sn = UnionSnapshotter(root)
    infos = sn.walk()
    numbers = {str(sn._store.get(info.name).number) for info in infos}
    assert {*os.listdir(f"{root}/snapshots")} == numbers, why
    names = {info.name for info in infos}
    assert all(info.parent in names or not info.parent for info in infos), why
    for info in infos:
        if info.kind is Kind.COMMITTED:
            (mount,) = sn.view("look", info.name)
            wanted = {"base": ["base"], "top": ["base", "top"]}[info.name]
            found = {name: Path(mount.source, name).read_text() for name in os.listdir(mount.source)}
            assert found == {name: f"{name}\n" for name in wanted}, why
            sn.remove("look")
        else:
            assert os.path.isdir(sn.mounts(info.name)[0].source), why
    sn.close()
    return infos


def unmount_all(directory: Path) -> None:
    """What the end of a machine does to its mounts."""
    for point in mounts_below(directory):
        take_down(point, servers_of(point))


def test_killed_at_any_step(tmp_path: Path) -> None:
    """The next start finds complete snapshots only, and nothing else on disk."""
    root = str(tmp_path / "root")
    at, killed, calls = 1, True, set()
    while killed:

        def operation(begin: Callable[[], None]) -> None:
            begin()
            live(root)

        killed, call = run_and_kill(operation, root, at)
        calls.add(call)
        unmount_all(tmp_path)
        look(root, f"killed before change {at}, {call}")
        at += 7
    assert {"mkdir", "pwrite64"} <= calls, calls
    sn = UnionSnapshotter(root)
    remove_all(sn)
    sn.close()
    assert mounts_below(tmp_path) == []


def test_power_is_cut_at_any_moment(tmp_path: Path) -> None:
    """What was confirmed is there, whatever the disk had of it."""
    disk, image, progress = tmp_path / "disk", tmp_path / "image", tmp_path / "progress"
    # The disk, what was confirmed before it was looked at, and after: other threads go on meanwhile.
    states: list[tuple[Path, set[str], set[str]]] = []

    def operation(begin: Callable[[], None]) -> None:
        begin()
        with open(progress, "w", buffering=1) as out:
            live(f"{disk}/root", lambda name: print(name, file=out))

    def confirmed() -> set[str]:
        return {*progress.read_text().split()} if progress.exists() else set()

    def watch(_: int, call: str) -> bool:
        # As the disk is now: what was not synced is in the kernel's memory only.
        state, before = tmp_path / f"state{len(states)}", confirmed()
        subprocess.run(["cp", "--sparse=always", image, state], check=True)
        after = confirmed()
        if states and subprocess.run(["cmp", "--quiet", state, states[-1][0]], check=False).returncode == 0:
            state.unlink()
            states[-1] = states[-1][0], before, after  # what the same disk has to show for later on
        else:
            states.append((state, before, after))
        return False

    with mounted_image(str(image), str(disk), size_bytes=48 << 20):
        run_and_watch(operation, str(disk), watch)
        unmount_all(disk)
    assert len(states) > 5
    shown = set()
    for state, before, after in states:
        subprocess.run(["mount", "-o", "loop", state, disk], check=True)
        try:
            infos = look(f"{disk}/root", f"confirmed: {before}") if (disk / "root").exists() else []
            found = {info.name for info in infos} | {"label" for info in infos if info.labels}
            promised = before & {"base", "top", "label"} | (
                {"container"} & before if "removing" not in after else set()
            )
            assert promised <= found, f"confirmed and lost: {promised - found}"
            assert not ("removed" in before and "container" in found)
            shown |= found
        finally:
            unmount_all(tmp_path)  # the disk too
        state.unlink()
    assert {"base", "top", "container", "label"} <= shown


def test_a_full_disk(tmp_path: Path) -> None:
    disk = mounted_image(str(tmp_path / "image"), str(tmp_path / "disk"), size_bytes=8 << 20)
    with disk, snapshotter_at(tmp_path / "disk", "object") as sn:
        top = two_layers(sn)
        with open(tmp_path / "disk/filler", "wb", buffering=0) as filler, pytest.raises(OSError, match="No space"):
            while True:
                filler.write(b"x" * 65536)
        with pytest.raises(SnapshotterError, match=r"free space on that disk") as caught:
            for number in range(1000):
                sn.prepare(f"k{number}", labels={"l": "x" * 4000})
        assert "\n" not in str(caught.value)
        os.unlink(tmp_path / "disk/filler")
        sn.prepare("works again", top)


# Bad input


def test_a_damaged_database(tmp_path: Path) -> None:
    root = tmp_path / "root"
    with snapshotter_at(tmp_path, "object"):
        pass
    path = root / "metadata.sqlite3"
    path.write_bytes(b"not a database, whatever it was" * 500)
    with pytest.raises(SnapshotterError, match=r"metadata.sqlite3: .*damaged; restore it, or move"):
        UnionSnapshotter(str(root))
    path.unlink()
    database = sqlite3.connect(path)
    database.execute("PRAGMA user_version = 99")
    database.close()
    with pytest.raises(SnapshotterError, match="later version"):
        UnionSnapshotter(str(root))


@pytest.mark.parametrize("damage", ["missing", "empty"])
def test_a_lost_database_costs_no_snapshot(tmp_path: Path, damage: str) -> None:
    """What nobody can tell the owner of is not garbage: it waits for the database to come back."""
    root = tmp_path / "root"
    first = UnionSnapshotter(str(root))
    first.prepare("box")
    first.close()
    files = [root / f"metadata.sqlite3{end}" for end in ("", "-wal", "-shm")]
    kept = {path: path.read_bytes() for path in files if path.exists()}
    for path in kept:
        path.unlink()
    if damage == "empty":
        files[0].touch()
    for _ in range(2):
        with pytest.raises(SnapshotterError, match=r"metadata.sqlite3: .*there are snapshots.*bring it back"):
            UnionSnapshotter(str(root))
    assert (root / "snapshots" / "1" / "fs").is_dir()
    for path, contents in kept.items():
        path.write_bytes(contents)
    again = UnionSnapshotter(str(root))
    assert again.stat("box").name == "box"
    again.close()


def serve(*words: str | Path, **more: str) -> subprocess.CompletedProcess[str]:
    """Run the command when it is expected to end by itself."""
    command = [sys.executable, "-m", "unionfs.cli.main", "serve", "snapshotter", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env={**os.environ, **more})


def test_what_the_command_refuses(tmp_path: Path) -> None:
    taken = tmp_path / "file"
    taken.write_text("")
    socket_path = tmp_path / "s.sock"
    cases: list[tuple[list[str | Path], str]] = [
        (["-o", "upperdir=/x"], "upperdir"),
        (["-o", "ro"], "-o ro"),
        (["-o", "nonsense=1"], "is no mount option"),
        (["--socket", taken], "is no socket"),
        (["--socket", "/tmp/" + "x" * 120], "longer than"),
        (["--root", taken / "below"], "choose another root"),
    ]
    for words, message in cases:
        done = serve("--root", tmp_path / "root", "--socket", socket_path, *words)
        assert done.returncode == 1, words
        assert message in done.stderr
        assert len(done.stderr.splitlines()) == 1, done.stderr


def test_the_command_from_start_to_end(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "s.sock"
    path.parent.mkdir()
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(path))
    stale.close()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.settimeout(60)
        command = [sys.executable, "-m", "unionfs.cli.main", "serve", "snapshotter"]
        command += ["--root", str(tmp_path / "root"), "--socket", str(path)]
        environment = {**os.environ, "NOTIFY_SOCKET": str(tmp_path / "notify")}
        with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
            try:
                assert systemd.recv(100) == b"READY=1"
                assert os.stat(path).st_mode & 0o777 == 0o600
                client = SnapshotterClient(str(path))
                assert client.prepare("key")[0].options == ("rbind", "rw")
                for root, message in (("root", "in use by process"), ("other", "listens on")):
                    done = serve("--root", tmp_path / root, "--socket", path)
                    assert (done.returncode, message in done.stderr) == (1, True), done.stderr
                assert client.stat("key").kind is Kind.ACTIVE
                client.close()
            finally:
                process.send_signal(signal.SIGTERM)
                said = process.communicate(timeout=60)[1]
            assert process.returncode == 0
            assert systemd.recv(100) == b"STOPPING=1"
    assert said == f"unionfs: serving snapshots of {tmp_path}/root on {path}\n"
    assert not path.exists()
