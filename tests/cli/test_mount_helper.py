"""mount(8), /etc/fstab and mount.fuse3, which find the mount program by its name."""

from __future__ import annotations

import os
import signal

import pytest

from tests.cli.programs import (
    BIN,
    Done,
    assert_one_line,
    layer_options,
    listed_at,
    mounted_under,
    options_shown,
    run,
    unionfs_mount,
)
from tests.support.mounts import is_running, servers_of, take_down, wait_until
from tests.support.sandbox import Sandbox, needs_root

pytest_plugins = ["tests.support.sandbox"]
needs_root()


@pytest.fixture
def layers(box: Sandbox) -> Sandbox:
    """A sandbox with one lower layer."""
    box.lower().file("name", b"text")
    return box


def installed(script: str) -> Done:
    """Run ``script`` where the programs are installed, in a mount namespace of its own.

    mount(8) gives its helper an environment without PATH, so a directory put in front of PATH is not searched.
    """
    script = f"set -e; mount --bind {BIN} /usr/local/bin; {script}"
    return run(["unshare", "-m", "--propagation", "private", "sh", "-c", script])


USE = """
    ls $target; echo new > $target/new; grep " $target " /proc/self/mountinfo; cat $upper/new; umount $target
"""


def test_mount(layers: Sandbox) -> None:
    options = layer_options(layers)
    done = installed(
        f"target={layers.target} upper={layers.upper}; mount -t fuse.unionfs-mount overlay $target -o {options}; {USE}"
    )
    assert (done.returncode, done.stderr) == (0, "")
    first, table, last = done.stdout.splitlines()
    assert (first, last) == ("name", "new")
    assert " - fuse.unionfs-mount overlay " in table
    assert wait_until(lambda: servers_of(layers.target) == (), 10)


def test_fstab(layers: Sandbox) -> None:
    fstab = f"{layers.root}/fstab"
    options = layer_options(layers)
    with open(fstab, "w", encoding="utf-8") as file:
        file.write(f"overlay {layers.target} fuse.unionfs-mount {options},nofail,x-systemd.automount,noexec 0 0\n")
    # "mount -a" comes again at every boot and reload, and finds it mounted.
    done = installed(
        f"target={layers.target} upper={layers.upper}; mount -T {fstab} $target; mount -a -T {fstab}; {USE}"
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("unionfs-mount: ") <= 1
    first, table, last = done.stdout.splitlines()
    assert (first, last) == ("name", "new")
    assert "noexec" in table
    assert wait_until(lambda: servers_of(layers.target) == (), 10)


def test_program_by_its_path(layers: Sandbox) -> None:
    """The other form of mount.fuse3, for a program that is not installed."""
    words = ["mount", "-t", "fuse", f"{BIN}/unionfs-mount#overlay", layers.target, "-o", layer_options(layers)]
    assert run(words).returncode == 0
    (pid,) = servers_of(layers.target)
    try:
        assert os.listdir(layers.target) == ["name"]
    finally:
        assert run(["umount", layers.target]).returncode == 0
    assert wait_until(lambda: not is_running(pid), 10)


def mount_fuse3(layers: Sandbox, *options: str) -> Done:
    words = [word for option in options for word in ("-o", option)]
    path = {"PATH": f"{BIN}:{os.environ['PATH']}"}
    return run(["mount.fuse3", "overlay", layers.target, *words, "-t", "unionfs-mount"], env=path)


def test_containerd(layers: Sandbox) -> None:
    done = mount_fuse3(layers, *layer_options(layers).split(","), "noexec")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    try:
        assert os.listdir(layers.target) == ["name"]
        shown = options_shown(layers.target)
        assert "noexec" in shown
        assert not shown & {"nodev", "nosuid"}
    finally:
        take_down(layers.target, servers_of(layers.target))


@pytest.mark.parametrize("ended_by", ["umount", "kill"])
def test_dropped_privileges(layers: Sandbox, ended_by: str) -> None:
    """mount.fuse3 mounts by itself, gives all capabilities up and hands over the descriptor."""
    done = mount_fuse3(layers, f"lowerdir={layers.lowers[0]}", "drop_privileges")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    try:
        assert os.listdir(layers.target) == ["name"]
        listed = listed_at(layers.target)
        assert listed is not None
        assert listed["state"] == "serving"
        pid = listed["pid"]
        if ended_by == "kill":
            # It may not unmount any more, but does not have to be killed with -9 either.
            os.kill(pid, signal.SIGTERM)
            assert wait_until(lambda: not is_running(pid), 10)
    finally:
        assert run(["umount", layers.target]).returncode == 0
    assert wait_until(lambda: not is_running(pid), 10)


def test_failure_reaches_the_caller(layers: Sandbox) -> None:
    done = installed(f"mount -t fuse.unionfs-mount overlay {layers.target} -o lowerdir={layers.root}/none")
    assert done.returncode != 0
    assert f"{layers.root}/none" in done.stderr
    assert done.stderr.count("\n") == 1
    assert mounted_under(layers.root) == []


def test_remount(layers: Sandbox) -> None:
    """mount(8) finds the program by the type that is shown, and it changes what the kernel decides by itself."""
    options = layer_options(layers)
    done = installed(
        f"target={layers.target}; mount -t fuse.unionfs-mount overlay $target -o {options},noexec; cd /; "
        'echo one > $target/new; mount -o remount,ro $target; grep " $target " /proc/self/mountinfo; '
        "echo two 2>&1 > $target/new || true; cat $target/new; "
        'mount -o remount,rw,exec,nosuid $target; grep " $target " /proc/self/mountinfo; '
        "echo three > $target/new; cat $target/new; umount $target"
    )
    read_only, one, again, three = [line for line in done.stdout.splitlines() if "Read-only" not in line]
    assert done.returncode == 0, done.stderr
    assert "Read-only file system" in done.stdout + done.stderr
    assert "unionfs-mount: " not in done.stderr
    assert (one, three) == ("one", "three")
    shown = [set(line.split()[5].split(",")) for line in (read_only, again)]
    assert {"ro", "noexec"} <= shown[0]
    assert {"rw", "nosuid"} <= shown[1]
    assert "noexec" not in shown[1]
    assert wait_until(lambda: servers_of(layers.target) == (), 10)


def test_remount_that_cannot_be(layers: Sandbox) -> None:
    with layers.mount("ro"):
        said = assert_one_line(unionfs_mount("-o", "remount,rw", layers.target))
        assert "mounted read-only" in said
    said = assert_one_line(unionfs_mount("-o", "remount,ro", layers.target))
    assert "no union is mounted there" in said
    assert "no union is mounted there" in assert_one_line(unionfs_mount("-o", "remount,ro"))
