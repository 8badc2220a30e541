"""The command lines that container engines use, one by one, on a layer store laid out as theirs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest

from tests.cli.programs import options_shown, run, server_of
from tests.support.mounts import is_running, mount_program, take_down, wait_until
from tests.support.sandbox import Sandbox, needs_root
from tests.support.syscalls import umount2

pytest_plugins = ["tests.support.sandbox"]
needs_root()


@dataclass
class Store:
    """``<root>/overlay``: each layer a directory ``ID/diff``, named in ``l/`` by a short symbolic link."""

    box: Sandbox
    root: str

    def layer(self, name: str, content: str) -> str:
        """Add a layer with one file; returns its short name's path."""
        os.makedirs(f"{self.root}/{name}/diff")
        with open(f"{self.root}/{name}/diff/{name}", "w", encoding="utf-8") as file:
            file.write(content)
        os.makedirs(f"{self.root}/l", exist_ok=True)
        short = f"{self.root}/l/{name.upper():A<26}"
        os.symlink(f"../{name}/diff", short)
        return short

    def container(self, name: str) -> str:
        """Add a container's directories; returns theirs."""
        for part in ("diff", "work", "merged", "empty"):
            os.makedirs(f"{self.root}/{name}/{part}")
        return f"{self.root}/{name}"

    @contextmanager
    def mounted(self, *words: str, cwd: str | None = None) -> Iterator[str]:
        """Run the program as engines do: in the store, its stderr read to the end."""
        target = words[-1]
        done = run([mount_program(), *words], cwd=cwd or self.root)
        assert (done.returncode, done.stdout) == (0, ""), done.stderr
        pid = server_of(target)
        try:
            yield done.stderr
        finally:
            # Engines unmount and remove the directory at once; the server has to see for itself.
            umount2(target)
            os.rmdir(target)
            assert wait_until(lambda: not is_running(pid), 10)


@pytest.fixture
def store(box: Sandbox) -> Store:
    """An empty layer store."""
    return Store(box, box.new_dir("overlay"))


def read(path: str) -> str:
    with open(path, encoding="utf-8") as file:
        return file.read()


def write(path: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write("new")


def test_podman_run(store: Store) -> None:
    a, b, c = store.layer("a", "top"), store.layer("b", "bottom"), store.container("c")
    options = f"lowerdir={a}:{b},upperdir={c}/diff,workdir={c}/work,,volatile"
    with store.mounted("-o", options, f"{c}/merged") as said:
        assert said == ""
        assert (read(f"{c}/merged/a"), read(f"{c}/merged/b")) == ("top", "bottom")
        write(f"{c}/merged/new")
        assert options_shown(f"{c}/merged") >= {"rw", "nodev", "noatime", "default_permissions", "allow_other"}
        assert "nosuid" not in options_shown(f"{c}/merged")
    assert read(f"{c}/diff/new") == "new"


def test_podman_start_with_a_trailing_comma(store: Store) -> None:
    a, c = store.layer("a", "top"), store.container("c")
    with store.mounted("-o", f"lowerdir={a},upperdir={c}/diff,workdir={c}/work,", f"{c}/merged") as said:
        assert said == ""
        write(f"{c}/merged/new")


def test_podman_read_only_layer(store: Store) -> None:
    a, b, c = store.layer("a", "top"), store.layer("b", "bottom"), store.container("c")
    options = f"lowerdir={c}/diff:{a}:{b}:{c}/empty"
    with store.mounted("-o", options, f"{c}/merged") as said:
        assert said == ""
        assert sorted(os.listdir(f"{c}/merged")) == ["a", "b"]
        with pytest.raises(OSError, match="Read-only"):
            write(f"{c}/merged/new")


def test_podman_additional_store_with_a_parent_after_a_link(store: Store) -> None:
    a, c = store.layer("a", "top"), store.container("c")
    os.mkdir(f"{store.root}/a/diff1")
    write(f"{store.root}/a/diff1/other")
    with store.mounted("-o", f"lowerdir={a}/../diff1:{a}", f"{c}/merged"):
        assert sorted(os.listdir(f"{c}/merged")) == ["a", "other"]


@pytest.mark.parametrize(
    ("mapping", "shown"),
    [(":0:200000:65536", (200000, 200007)), (":0:1:7:7:0:1:8:8:65528", (1, 0))],
    ids=["uidmap", "keep-id"],
)
def test_podman_uidmap(store: Store, mapping: str, shown: tuple[int, int]) -> None:
    a, c = store.layer("a", "top"), store.container("c")
    os.chown(f"{store.root}/a/diff/a", 0, 7)
    options = f"lowerdir={a},upperdir={c}/diff,workdir={c}/work,uidmapping={mapping},gidmapping={mapping}"
    with store.mounted("-o", options, f"{c}/merged") as said:
        assert said == ""
        info = os.stat(f"{c}/merged/a")
        assert (info.st_uid, info.st_gid) == shown


def test_podman_squash(store: Store) -> None:
    a, c = store.layer("a", "top"), store.container("c")
    options = f"lowerdir={a},upperdir={c}/diff,workdir={c}/work,squash_to_uid=1000,squash_to_gid=1001"
    with store.mounted("-o", options, f"{c}/merged"):
        info = os.stat(f"{c}/merged/a")
        assert (info.st_uid, info.st_gid) == (1000, 1001)


def test_podman_force_mask(store: Store) -> None:
    a, c = store.layer("a", "top"), store.container("c")
    options = f"lowerdir={a},upperdir={c}/diff,workdir={c}/work,xattr_permissions=2"
    with store.mounted("-o", options, f"{c}/merged"):
        write(f"{c}/merged/new")
        os.chmod(f"{c}/merged/new", 0o4755)
        assert os.stat(f"{c}/merged/new").st_mode & 0o7777 == 0o4755
    assert os.getxattr(f"{c}/diff/new", "user.containers.override_stat").startswith(b"0:0:4755")


def test_podman_mountopt_and_selinux(store: Store) -> None:
    a, c = store.layer("a", "top"), store.container("c")
    options = (
        f"lowerdir={a},upperdir={c}/diff,workdir={c}/work,fsync=0,volatile,"
        'context="system_u:object_r:container_file_t:s0:c1,c2"'
    )
    with store.mounted("-o", options, f"{c}/merged") as said:
        assert said == ""
        write(f"{c}/merged/new")


def test_podman_overlay_volume(store: Store) -> None:
    """``-v DIR:/x:O``, from any working directory."""
    a, c = store.layer("a", "top"), store.container("c")
    options = f"lowerdir={a},upperdir={c}/diff,workdir={c}/work,private"
    with store.mounted("-o", options, f"{c}/merged", cwd="/") as said:
        assert said == "unionfs-mount: unknown options are ignored: private\n"
    c = store.container("d")
    with store.mounted("-o", f"lowerdir={a},private", f"{c}/merged", cwd="/"):
        assert os.listdir(f"{c}/merged") == ["a"]


def test_podman_info(store: Store) -> None:
    for flag in ("--version", "-V"):
        done = run([mount_program(), flag], cwd=store.root)
        assert (done.returncode, done.stderr) == (0, "")
        first, *others = done.stdout.splitlines()
        assert first.startswith("unionfs-mount: version ")
        assert any(line.startswith("FUSE library version: 3.") for line in others)


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help(flag: str) -> None:
    done = run([mount_program(), flag])
    assert (done.returncode, done.stderr) == (0, "")
    assert "TARGET" in done.stdout


def test_dockerd(store: Store) -> None:
    """Parents are read-only mounts of the parent's own diff."""
    a, b, c = store.layer("a", "top"), store.layer("b", "bottom"), store.container("c")
    with store.mounted("-o", f"lowerdir={a}:{b},upperdir={c}/diff,workdir={c}/work", f"{c}/merged"):
        write(f"{c}/merged/new")
    os.mkdir(f"{c}/merged")
    with store.mounted("-o", f"lowerdir={c}/diff:{a}:{b}", f"{c}/merged"):
        assert sorted(os.listdir(f"{c}/merged")) == ["a", "b", "new"]


def test_containerd_through_mount_fuse3(store: Store) -> None:
    a, b, c = store.layer("a", "top"), store.layer("b", "bottom"), store.container("c")
    options = f"workdir={c}/work,upperdir={c}/diff,lowerdir={a}:{b},dev,suid"
    done = run([mount_program(), "overlay", f"{c}/merged", "-o", options])
    assert (done.returncode, done.stderr) == (0, "")
    try:
        assert read(f"{c}/merged/b") == "bottom"
        shown = options_shown(f"{c}/merged")
        assert not shown & {"nodev", "nosuid"}
    finally:
        take_down(f"{c}/merged", [server_of(f"{c}/merged")])


def test_hundred_layers(store: Store) -> None:
    layers = [store.layer(f"layer{n:04}", str(n)) for n in range(120)]
    c = store.container("c")
    options = f"lowerdir={':'.join(layers)},upperdir={c}/diff,workdir={c}/work"
    assert len(options) > 4096
    with store.mounted("-o", options, f"{c}/merged"):
        assert len(os.listdir(f"{c}/merged")) == 120


def test_options_of_100_kilobytes(store: Store) -> None:
    """The kernel's page limit for mount options is not ours."""
    long = "/".join(["d" * 250] * 2)
    os.makedirs(f"{store.root}/{long}")
    layers = []
    for number in range(200):
        layers.append(f"{store.root}/{long}/{number}")
        os.mkdir(layers[-1])
    write(f"{layers[-1]}/bottom")
    c = store.container("c")
    options = f"lowerdir={':'.join(layers)},upperdir={c}/diff,workdir={c}/work"
    assert len(options) > 100_000
    with store.mounted("-o", options, f"{c}/merged"):
        assert read(f"{c}/merged/bottom") == "new"


def test_repeated_and_glued_options(store: Store) -> None:
    a, c = store.layer("a", "top"), store.container("c")
    words = [f"-olowerdir={a}", "-o", f"upperdir={c}/diff", f"-oworkdir={c}/work,noexec", "-o", ",", f"{c}/merged"]
    with store.mounted(*words) as said:
        assert said == ""
        assert "noexec" in options_shown(f"{c}/merged")
        write(f"{c}/merged/new")


def test_names_with_special_characters(store: Store) -> None:
    c = store.container("c")
    odd = 'a:b,c\\d"e f\n'
    os.makedirs(f"{store.root}/{odd}/lower")
    os.makedirs(f"{store.root}/{odd}/upper")
    os.makedirs(f"{store.root}/{odd}/work")
    write(f"{store.root}/{odd}/lower/file")
    prefix = f"{store.root}/" + r'a\:b\,c\\d"e f' + "\n"
    options = f"lowerdir={prefix}/lower,upperdir={prefix}/upper,workdir={prefix}/work"
    with store.mounted("-o", options, f"{c}/merged") as said:
        assert said == ""
        assert os.listdir(f"{c}/merged") == ["file"]
        write(f"{c}/merged/new")
    assert os.listdir(f"{store.root}/{odd}/upper") == ["new"]


def test_same_upper_mounted_twice(store: Store) -> None:
    """``ctr snapshots diff`` does that to a running container."""
    a, c, d = store.layer("a", "top"), store.container("c"), store.container("d")
    options = f"lowerdir={a},upperdir={c}/diff,workdir={c}/work"
    with store.mounted("-o", options, f"{c}/merged"):
        write(f"{c}/merged/new")
        with store.mounted("-o", options, f"{d}/merged") as said:
            assert said.count("\n") == 1
            assert sorted(os.listdir(f"{d}/merged")) == ["a", "new"]
