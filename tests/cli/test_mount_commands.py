"""``unionfs mount``, ``umount`` and ``mounts``: what people see."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest

from tests.cli.programs import (
    BIN,
    assert_one_line,
    layer_options,
    listed,
    listed_at,
    mounted_under,
    options_shown,
    run,
    server_of,
    unionfs,
    unionfs_mount,
)
from tests.support.mounts import is_mounted, is_running, other_namespace, servers_of, take_down, wait_until
from tests.support.sandbox import Sandbox, needs_root
from unionfs.cli import mount_commands
from unionfs.fuse_ops.session import mount_registry
from unionfs.host.mounts import Mount

pytest_plugins = ["tests.support.sandbox"]
needs_root()


@pytest.fixture
def layers(box: Sandbox) -> Iterator[Sandbox]:
    """A sandbox with two lower layers, unmounted when the test is over."""
    box.lower().file("name", b"top")
    box.lower().file("name", b"bottom").file("other", b"bottom")
    yield box
    while is_mounted(box.target):
        take_down(box.target, servers_of(box.target))


def mount(box: Sandbox, *words: str) -> int:
    """Mount with ``words`` before the target; returns the server."""
    lowers = [word for path in box.lowers for word in ("--lower", path)]
    done = unionfs("mount", *lowers, *words, box.target)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    return server_of(box.target)


def read(path: str) -> str:
    with open(path, encoding="utf-8") as file:
        return file.read()


def write(path: str, text: str = "new") -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)


def test_mount_and_umount(layers: Sandbox) -> None:
    pid = mount(layers, "--upper", str(layers.upper), "--work", str(layers.work))
    assert (read(layers.at("name")), read(layers.at("other"))) == ("top", "bottom")
    write(layers.at("new"))
    done = unionfs("umount", layers.target)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    # It has waited: no server is left that could still hold or write something.
    assert not is_running(pid)
    assert not is_mounted(layers.target)
    assert read(layers.in_upper("new")) == "new"


def test_read_only_without_upper(layers: Sandbox) -> None:
    mount(layers)
    assert "ro" in options_shown(layers.target)
    with pytest.raises(OSError, match="Read-only"):
        write(layers.at("new"))


def test_work_directory_is_made_beside_the_upper(layers: Sandbox) -> None:
    mount(layers, "--upper", str(layers.upper))
    write(layers.at("new"))
    assert os.path.isdir(f"{layers.upper}.work")


def test_work_directory_is_not_left_by_a_failure(layers: Sandbox) -> None:
    done = unionfs("mount", "--lower", f"{layers.root}/none", "--upper", str(layers.upper), layers.target)
    said = assert_one_line(done, "unionfs")
    assert f"{layers.root}/none" in said
    assert not os.path.exists(f"{layers.upper}.work")
    assert mounted_under(layers.root) == []


def test_every_flag_reaches_the_mount(layers: Sandbox) -> None:
    flags = {
        ("--uidmapping", "0:5:1"): "uidmapping=0\\:5\\:1",
        ("--gidmapping", "0:6:1"): "gidmapping=0\\:6\\:1",
        ("--static-nlink",): "static_nlink",
        ("--noacl",): "noacl",
        ("--noxattrs",): "noxattrs",
        ("--volatile",): "volatile",
        ("--no-fsync",): "fsync=0",
        ("--no-writeback",): "writeback=0",
        ("--timeout", "5"): "timeout=5",
        ("--redirect-dir", "on"): "redirect_dir=on",
        ("--metacopy", "on"): "metacopy=on",
        ("--xino", "off"): "xino=off",
        ("-o", "noexec"): "noexec",
        ("--source", "name"): "name",
    }
    pid = mount(layers, "--upper", str(layers.upper), *(word for flag in flags for word in flag))
    with open(f"/proc/{pid}/cmdline", encoding="utf-8") as file:
        assert set(flags.values()) <= set(file.read().split("\0"))
    info = os.stat(layers.target)
    assert (info.st_uid, info.st_gid, info.st_nlink) == (5, 6, 1)
    assert "noexec" in options_shown(layers.target)


def test_other_flags_reach_the_mount(layers: Sandbox) -> None:
    mount(layers, "--upper", str(layers.upper), "--squash-to-uid", "7", "--squash-to-gid", "8", "--read-only")
    info = os.stat(layers.at("name"))
    assert (info.st_uid, info.st_gid) == (7, 8)
    assert "ro" in options_shown(layers.target)


def test_names_with_special_characters(layers: Sandbox) -> None:
    odd = layers.new_dir('a:b,c\\d"e[red]f')
    write(f"{odd}/file")
    done = unionfs("mount", "-l", odd, layers.target)
    assert (done.returncode, done.stderr) == (0, "")
    assert os.listdir(layers.target) == ["file"]
    found = listed_at(layers.target)
    assert found is not None
    assert found["lowerdirs"] == [odd]
    assert "[red]" in unionfs("mounts").stdout


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["mount"], "TARGET"),
        (["mount", "/mnt"], "--lower"),
        (["mount", "--lower", "/", "--work", "/w", "/mnt"], "--upper"),
        (["mount", "--xino", "maybe", "--lower", "/", "/mnt"], "maybe"),
        (["mount", "--nonsense", "/mnt"], "--nonsense"),
        (["umount"], "TARGET"),
        (["nonsense"], "nonsense"),
    ],
)
def test_wrong_usage(words: list[str], name: str) -> None:
    assert name in assert_one_line(unionfs(*words), "unionfs", 2)


def test_unknown_option_is_refused(layers: Sandbox) -> None:
    done = unionfs(
        "mount", "--lower", layers.lowers[0], "-u", str(layers.upper), "-o", "nosuch=1,ro,foo", layers.target
    )
    said = assert_one_line(done, "unionfs")
    assert "nosuch=1, foo" in said
    assert mounted_under(layers.root) == []
    assert not os.path.exists(f"{layers.upper}.work")


def test_empty_target(layers: Sandbox) -> None:
    assert "TARGET is empty" in assert_one_line(unionfs("mount", "-l", layers.lowers[0], ""), "unionfs", 2)
    assert "TARGET is empty" in assert_one_line(unionfs("umount", ""), "unionfs")


def test_upper_in_use(layers: Sandbox) -> None:
    """People are kept from it, engines are warned."""
    mount(layers, "--upper", str(layers.upper))
    second = layers.new_dir("second")
    words = ["-l", layers.lowers[0], "-u", str(layers.upper)]
    for more in ([], ["--work", str(layers.work)]):
        said = assert_one_line(unionfs("mount", *words, *more, second), "unionfs")
        assert f"{layers.upper} is in use by another mount" in said
        assert "--force" in said
    assert os.listdir(f"{layers.upper}.work") == ["work"]
    for command in (
        [f"{BIN}/unionfs", "mount", *words, "--force", second],
        [
            f"{BIN}/unionfs-mount",
            "-o",
            f"lowerdir={layers.lowers[0]},upperdir={layers.upper},workdir={layers.upper}.work",
            second,
        ],
    ):
        done = run(command)
        assert done.returncode == 0
        assert done.stderr.count("in use by another mount") == 1
        take_down(second, servers_of(second))
    take_down(layers.target, servers_of(layers.target))
    mount(layers, "--upper", str(layers.upper))


def test_quota_with_a_unit(layers: Sandbox) -> None:
    mount(layers, "--upper", str(layers.upper), "-o", "quota=10M")
    shown = os.statvfs(layers.target)
    assert shown.f_blocks * shown.f_frsize == 10 << 20


def test_mistake_in_a_value(layers: Sandbox) -> None:
    done = unionfs("mount", "--lower", layers.lowers[0], "--timeout", "ten", layers.target)
    assert "timeout=ten" in assert_one_line(done, "unionfs")


def test_debug_shows_where(layers: Sandbox) -> None:
    done = unionfs("--debug", "mount", "--lower", f"{layers.root}/none", layers.target)
    assert done.returncode == 1
    assert "open_tree" in done.stderr


def test_foreground(layers: Sandbox) -> None:
    words = ["mount", "--foreground", "--lower", layers.lowers[0], layers.target]
    server = subprocess.Popen([f"{BIN}/unionfs", *words], stderr=subprocess.PIPE, text=True)
    assert wait_until(lambda: is_mounted(layers.target), 10)
    assert server_of(layers.target) == server.pid
    assert read(layers.at("name")) == "top"
    server.send_signal(signal.SIGINT)
    assert server.communicate(timeout=10)[1] == ""
    assert server.returncode == 0


def test_mounts(layers: Sandbox) -> None:
    before = time.time()
    pid = mount(layers, "--upper", str(layers.upper), "--work", str(layers.work), "--source", "somewhere")
    found = listed_at(layers.target)
    assert found is not None
    assert before <= found.pop("mounted_at") <= time.time()
    assert found.pop("minor") == os.minor(os.stat(layers.target).st_dev)
    assert found.pop("started") > 0
    assert found.pop("transport").startswith(("pyfuse3", "direct"))
    assert found.pop("supervised") is False
    assert found == {
        "target": layers.target,
        "state": "serving",
        "pid": pid,
        "source": "somewhere",
        "lowerdirs": layers.lowers,
        "datadirs": [],
        "upperdir": layers.upper,
        "workdir": layers.work,
        "options": ["default_permissions", "allow_other", "suid", "noatime"],
    }
    lines = unionfs("mounts").stdout.splitlines()
    assert lines[0].split() == ["TARGET", "LAYERS", "UPPER", "PID", "STATE"]
    first = next(at for at, line in enumerate(lines) if layers.target in line)
    assert lines[first].split() == [layers.target, layers.lowers[0], layers.upper, str(pid), "serving"]
    assert lines[first + 1].split() == [layers.lowers[1]]
    unionfs("umount", layers.target)
    assert listed_at(layers.target) is None


def test_mounts_without_records(layers: Sandbox) -> None:
    """A server that could not write its record is shown all the same."""
    pid = mount(layers)
    found = listed_at(layers.target)
    assert found is not None
    os.unlink(f"/run/unionfs/{found['minor']}.json")
    found = listed_at(layers.target)
    assert found is not None
    assert (found["state"], found["pid"]) == ("unknown", None)
    assert unionfs("umount", layers.target).returncode == 0
    assert wait_until(lambda: not is_running(pid), 10)


def test_record_of_a_later_version(layers: Sandbox) -> None:
    """What this version does not know of is left out."""
    pid = mount(layers)
    found = listed_at(layers.target)
    assert found is not None
    path = f"/run/unionfs/{found['minor']}.json"
    with open(path, encoding="utf-8") as file:
        record = json.load(file)
    write(path, json.dumps(record | {"something": ["new"]}))
    assert listed_at(layers.target) == found
    write(path, json.dumps([record]))
    assert (listed_at(layers.target) or {})["state"] == "unknown"
    assert unionfs("umount", layers.target).returncode == 0
    assert wait_until(lambda: not is_running(pid), 10)


def test_leftover_record_is_removed() -> None:
    os.makedirs("/run/unionfs", exist_ok=True)
    path = "/run/unionfs/999999.json"
    write(
        path,
        '{"minor": 999999, "target": "/gone", "pid": 1, "started": 1, "mounted_at": 1, "source": "", '
        '"lowerdirs": [], "datadirs": [], "upperdir": null, "workdir": null, "options": [], "transport": ""}',
    )
    assert "/gone" not in [mount["target"] for mount in listed()]
    assert not os.path.exists(path)


def test_dead_server(layers: Sandbox) -> None:
    pid = mount(layers)
    os.kill(pid, signal.SIGKILL)
    assert wait_until(lambda: not is_running(pid), 10)
    # Whoever lists the mounts of another mount namespace does not see it, and leaves its record alone.
    elsewhere = f"umount -l {layers.target}; {BIN}/unionfs mounts --json"
    assert layers.target not in run(["unshare", "-m", "--propagation", "private", "sh", "-c", elsewhere]).stdout
    found = listed_at(layers.target)
    assert found is not None
    assert found["state"] == "dead"
    assert "dead" in unionfs("mounts").stdout
    assert unionfs("umount", "--lazy", layers.target).returncode == 0
    assert listed_at(layers.target) is None
    mount(layers)


def test_umount_of_a_busy_mount_says_who(layers: Sandbox) -> None:
    pid = mount(layers)
    with open(layers.at("name"), encoding="utf-8"):
        said = assert_one_line(unionfs("umount", layers.target), "unionfs")
        assert f"(pid {os.getpid()}, has {layers.target}/name open)" in said
        assert "--lazy" in said
        assert is_mounted(layers.target)
        assert unionfs("umount", "--lazy", layers.target).returncode == 0
        assert not is_mounted(layers.target)
        assert is_running(pid)
    assert wait_until(lambda: not is_running(pid), 10)


def test_umount_says_who_works_or_runs_there(layers: Sandbox) -> None:
    mount(layers)
    user = subprocess.Popen(["sleep", "60"], cwd=layers.target)
    try:
        said = assert_one_line(unionfs("umount", layers.target), "unionfs")
        assert f"sleep (pid {user.pid}, works in {layers.target})" in said
    finally:
        user.kill()
        user.wait()


def test_umount_says_what_is_mounted_inside(layers: Sandbox) -> None:
    os.mkdir(f"{layers.lowers[0]}/inside")
    mount(layers)
    subprocess.run(["mount", "-t", "tmpfs", "none", layers.at("inside")], check=True)
    try:
        said = assert_one_line(unionfs("umount", layers.target), "unionfs")
        assert f"{layers.target}/inside is mounted inside" in said
    finally:
        subprocess.run(["umount", layers.at("inside")], check=True)


def test_umount_of_something_else(layers: Sandbox) -> None:
    assert "nothing is mounted" in assert_one_line(unionfs("umount", layers.root), "unionfs")
    assert "proc" in assert_one_line(unionfs("umount", "/proc"), "unionfs")
    assert os.path.exists("/proc/self")


def test_umount_of_several_goes_on_after_a_failure(layers: Sandbox) -> None:
    second = layers.new_dir("second")
    pid = mount(layers)
    assert unionfs_mount("-o", layer_options(layers), second).returncode == 0
    done = unionfs("umount", layers.target, layers.root, second)
    assert layers.root in assert_one_line(done, "unionfs")
    assert mounted_under(layers.root) == []
    assert not is_running(pid)


def test_umount_through_a_link(layers: Sandbox) -> None:
    mount(layers)
    os.symlink("mnt", f"{layers.root}/link")
    assert unionfs("umount", f"{layers.root}/link").returncode == 0
    assert not is_mounted(layers.target)


def test_umount_waits_until_everything_is_written(layers: Sandbox) -> None:
    pid = mount(layers, "--upper", str(layers.upper))
    data = os.urandom(8 << 20)
    with open(layers.at("big"), "wb") as file:
        file.write(data)
    assert unionfs("umount", layers.target).returncode == 0
    assert not is_running(pid)
    with open(layers.in_upper("big"), "rb") as file:
        assert file.read() == data


def test_umount_does_not_wait_for_a_copy_in_another_namespace(layers: Sandbox) -> None:
    """The directory is the user's, so it stays, and with it the copy."""
    pid = mount(layers, "--upper", str(layers.upper))
    with other_namespace():
        done = unionfs("umount", layers.target)
    assert done.returncode == 0
    assert done.stderr == (
        f"unionfs: {layers.target} is unmounted here, but its server goes on: another mount namespace has it too\n"
    )
    assert os.path.isdir(layers.target)
    assert wait_until(lambda: not is_running(pid), 10)


def test_umount_does_not_wait_for_a_stranger(
    layers: Sandbox, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The server ended, and another process has its number now."""
    server = mount(layers)
    real = mount_registry.find

    def find(mount: Mount | None) -> mount_registry.MountRecord | None:
        record = real(mount)
        return None if record is None else replace(record, pid=os.getpid())

    monkeypatch.setattr(mount_registry, "find", find)
    monkeypatch.setattr(mount_commands, "_SERVER_END_S", 1.0)
    mount_commands.unmount_target(layers.target, lazy=False)
    assert capfd.readouterr().err == ""
    assert wait_until(lambda: not is_running(server), 60)


def test_no_mounts_are_said_to_be_none() -> None:
    done = run(["unshare", "-m", "sh", "-c", f"mount -t tmpfs none /run; {BIN}/unionfs mounts"])
    assert done.returncode == 0
    assert done.stderr == ""


def test_reader_that_goes_away() -> None:
    done = run(["sh", "-c", f"{BIN}/unionfs mounts --help | true; {BIN}/unionfs mounts | true"])
    assert done.stderr == ""


def test_help_and_version() -> None:
    assert unionfs("--version").stdout.startswith("unionfs: version ")
    for words in ([], ["mount"], ["umount"], ["mounts"]):
        done = unionfs(*words, "--help")
        assert done.returncode == 0
        assert "Usage: unionfs" in done.stdout


@pytest.mark.parametrize("words", [[], ["layer"], ["image"], ["container"], ["serve"]])
def test_without_a_command_there_is_help(words: list[str]) -> None:
    """As wrong usage, in lines, whatever the installed version of click would do by itself."""
    done = unionfs(*words)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == unionfs(*words, "--help").stdout
    assert len(done.stderr.splitlines()) > 5
