"""Whatever is wrong with a mount command: one line says what, the status is 1, and nothing is left mounted."""

from __future__ import annotations

import os
import signal
import stat
from collections.abc import Callable

import pytest

from tests.cli.programs import (
    BIN,
    Done,
    assert_one_line,
    layer_options,
    mounted_under,
    run,
    server_of,
    unionfs_mount,
)
from tests.support.mounts import mount_program, mounted_tmpfs, servers_of, take_down, wait_until
from tests.support.sandbox import Sandbox, needs_root
from tests.support.syscalls import mount

pytest_plugins = ["tests.support.sandbox"]
needs_root()

NOBODY = 65534


@pytest.fixture
def layers(box: Sandbox) -> Sandbox:
    """A sandbox with one lower layer."""
    box.lower().file("name", b"text")
    return box


def refused(done: Done, box: Sandbox, *names: str) -> None:
    """Check that ``done`` is a proper refusal that names ``names``."""
    said = assert_one_line(done)
    for name in names:
        assert name in said
    assert mounted_under(box.root) == []
    assert servers_of(box.target) == ()


def a_file(box: Sandbox) -> str:
    path = os.path.join(box.root, "file")
    with open(path, "w", encoding="utf-8"):
        pass
    return path


WRONG_WORDS: dict[str, Callable[[Sandbox], tuple[list[str], list[str]]]] = {
    "missing layer": lambda b: (["-o", f"lowerdir={b.root}/none", b.target], [f"{b.root}/none"]),
    "mount point that the server needs": (lambda b: (["-o", layer_options(b), "/proc"], ["/proc", "choose another"])),
    "one missing layer of several": lambda b: (
        ["-o", f"lowerdir={b.lowers[0]}:{b.root}/none", b.target],
        [f"{b.root}/none"],
    ),
    "file as layer": lambda b: (["-o", f"lowerdir={a_file(b)}", b.target], [f"{b.root}/file"]),
    "missing upper": lambda b: (
        ["-o", f"lowerdir={b.lowers[0]},upperdir={b.root}/none,workdir={b.work}", b.target],
        [f"{b.root}/none"],
    ),
    "file as upper": lambda b: (
        ["-o", f"lowerdir={b.lowers[0]},upperdir={a_file(b)},workdir={b.work}", b.target],
        [f"{b.root}/file"],
    ),
    "missing work directory": lambda b: (
        ["-o", f"lowerdir={b.lowers[0]},upperdir={b.upper},workdir={b.root}/none", b.target],
        [f"{b.root}/none"],
    ),
    "file as work directory": lambda b: (
        ["-o", f"lowerdir={b.lowers[0]},upperdir={b.upper},workdir={a_file(b)}", b.target],
        [f"{b.root}/file"],
    ),
    "missing target": lambda b: (["-o", layer_options(b), f"{b.root}/none"], [f"{b.root}/none", "does not exist"]),
    "file as target": lambda b: (["-o", layer_options(b), a_file(b)], [f"{b.root}/file", "not a directory"]),
    "no lowerdir": lambda b: ([b.target], ["lowerdir"]),
    "no work directory": lambda b: (["-o", f"lowerdir={b.lowers[0]},upperdir={b.upper}", b.target], ["workdir"]),
    "bad number": lambda b: (["-o", layer_options(b) + ",timeout=ten", b.target], ["timeout=ten"]),
    "bad mapping": lambda b: (["-o", layer_options(b) + ",uidmapping=0:1", b.target], ["uidmapping=0:1"]),
    "duplicate option": lambda b: (["-o", layer_options(b), "-o", "upperdir=/", b.target], ["upperdir", "twice"]),
    "index=on": lambda b: (["-o", layer_options(b) + ",index=on", b.target], ["index=on"]),
    "empty target": lambda b: (["-o", layer_options(b), ""], ["mount point is empty"]),
    "upper is lower": lambda b: (
        ["-o", f"lowerdir={b.lowers[0]},upperdir={b.lowers[0]},workdir={b.work}", b.target],
        [f"{b.lowers[0]} is lower layer"],
    ),
    "no target": lambda b: (["-o", layer_options(b)], ["mount point"]),
    "three names": lambda b: (["-o", layer_options(b), "a", "b", b.target], ["3 names"]),
    "-o without value": lambda b: ([b.target, "-o"], ["-o"]),
    "unknown flag": lambda b: (["-q", "-o", layer_options(b), b.target], ["-q"]),
    "new line in a name": lambda b: (["-o", f"lowerdir={b.root}/a\nb", b.target], [r"a\nb"]),
}


@pytest.mark.parametrize("case", WRONG_WORDS)
def test_wrong_words(layers: Sandbox, case: str) -> None:
    words, names = WRONG_WORDS[case](layers)
    refused(unionfs_mount(*words), layers, *names)


@pytest.mark.parametrize("case", ["missing layer", "bad number", "missing target"])
def test_wrong_words_in_the_foreground(layers: Sandbox, case: str) -> None:
    words, names = WRONG_WORDS[case](layers)
    refused(unionfs_mount("-f", *words), layers, *names)


def test_debug_shows_where(layers: Sandbox) -> None:
    done = unionfs_mount("-d", "-o", f"lowerdir={layers.root}/none", layers.target)
    assert done.returncode == 1
    assert "Traceback" in done.stderr


def test_work_on_another_file_system(layers: Sandbox) -> None:
    other = layers.new_dir("other")
    with mounted_tmpfs(other):
        os.mkdir(f"{other}/work")
        options = f"lowerdir={layers.lowers[0]},upperdir={layers.upper},workdir={other}/work"
        said = assert_one_line(unionfs_mount("-o", options, layers.target))
        assert f"{other}/work" in said
        assert mounted_under(layers.root) == [other]


def test_upper_without_xattrs(layers: Sandbox) -> None:
    other = layers.new_dir("other")
    mount("ramfs", other, "ramfs", 0, "")
    try:
        os.mkdir(f"{other}/upper")
        os.mkdir(f"{other}/work")
        options = f"lowerdir={layers.lowers[0]},upperdir={other}/upper,workdir={other}/work"
        said = assert_one_line(unionfs_mount("-o", options, layers.target))
        assert "attribute" in said
        assert f"{other}/upper" in said
        assert mounted_under(layers.root) == [other]
    finally:
        take_down(other)


def test_target_with_our_mount(layers: Sandbox) -> None:
    with layers.mount() as here:
        said = assert_one_line(unionfs_mount("-o", f"lowerdir={layers.lowers[0]}", layers.target))
        assert "busy" in said
        assert layers.target in said
        assert servers_of(layers.target) == (here.pid,)
        assert mounted_under(layers.root) == [layers.target]


def test_target_with_a_dead_mount(layers: Sandbox) -> None:
    with layers.mount() as here:
        here.expect_end = False
        os.kill(here.pid, signal.SIGKILL)
        assert wait_until(lambda: not os.path.exists(f"/proc/{here.pid}/fd/0"), 5)
        said = assert_one_line(unionfs_mount("-o", f"lowerdir={layers.lowers[0]}", layers.target))
        assert "dead" in said
        assert "umount --lazy" in said
    assert mounted_under(layers.root) == []


def in_namespace(script: str, *words: str, user: int | None = None) -> Done:
    """Run the program with ``words`` after ``script``, in a mount namespace of its own."""
    become = "" if user is None else f"setpriv --reuid {user} --regid {user} --clear-groups "
    command = f'{script} && exec {become}"$@"'
    argv = ["unshare", "-m", "--propagation", "private", "sh", "-c", command, "sh"]
    return run([*argv, mount_program(), *words])


def test_no_permission_on_dev_fuse(layers: Sandbox) -> None:
    """As another user, whom fusermount3 could help, were it not for the device's mode."""
    node = f"{layers.root}/fuse"
    os.mknod(node, stat.S_IFCHR | 0o600, os.makedev(10, 229))
    os.chown(layers.target, NOBODY, NOBODY)
    done = in_namespace(
        f"mount --bind {node} /dev/fuse", "-o", f"lowerdir={layers.lowers[0]}", layers.target, user=NOBODY
    )
    refused(done, layers, "/dev/fuse", "Permission denied", "chmod")


def test_dev_fuse_is_something_else(layers: Sandbox) -> None:
    done = in_namespace("mount --bind /dev/null /dev/fuse", "-o", layer_options(layers), layers.target)
    refused(done, layers, layers.target)


def test_no_dev_fuse(layers: Sandbox) -> None:
    dev = layers.new_dir("dev")
    os.mknod(f"{dev}/null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    done = in_namespace(f"mount --bind {dev} /dev", "-o", layer_options(layers), layers.target)
    refused(done, layers, "modprobe fuse")


def test_layer_that_may_not_be_read(layers: Sandbox) -> None:
    secret = layers.lower().dir("", mode=0o711)
    os.chown(layers.target, NOBODY, NOBODY)
    options = f"lowerdir={layers.lowers[0]}:{secret.root}"
    refused(in_namespace("true", "-o", options, layers.target, user=NOBODY), layers, secret.root, "must be readable")
    os.chmod(secret.root, 0)
    refused(in_namespace("true", "-o", options, layers.target, user=NOBODY), layers, secret.root, "must be readable")


def test_more_layers_than_files_may_be_open(layers: Sandbox) -> None:
    many = ":".join(layers.lower().root for _ in range(40))
    limited = ["setpriv", "--bounding-set=-sys_resource", "sh", "-c", 'ulimit -n 50; exec "$@"', "sh"]
    done = run([*limited, mount_program(), "-o", f"lowerdir={many}", layers.target])
    refused(done, layers, "too many open files", "may have 50", "ulimit")


def test_allow_other_that_is_not_allowed(layers: Sandbox) -> None:
    """What fusermount3 refuses is said in our words too."""
    os.chown(layers.target, NOBODY, NOBODY)
    node, config = f"{layers.root}/fuse", f"{layers.root}/fuse.conf"
    os.mknod(node, stat.S_IFCHR | 0o600, os.makedev(10, 229))
    os.chmod(node, 0o666)
    with open(config, "w", encoding="utf-8"):
        pass
    script = f"mount --bind {node} /dev/fuse && touch /etc/fuse.conf && mount --bind {config} /etc/fuse.conf"
    done = in_namespace(script, "-o", f"lowerdir={layers.lowers[0]},allow_other", layers.target, user=NOBODY)
    refused(done, layers, "user_allow_other")


def test_unknown_words_are_one_line_and_no_failure(layers: Sandbox) -> None:
    options = layer_options(layers) + ",private,user,nofail,x-systemd.automount,_netdev,metacopy=off"
    done = unionfs_mount("-o", options, layers.target)
    try:
        assert done.returncode == 0
        assert done.stdout == ""
        assert done.stderr.splitlines() == [
            "unionfs-mount: unknown options are ignored: private,user,nofail,x-systemd.automount,_netdev"
        ]
    finally:
        take_down(layers.target, [server_of(layers.target)])


def test_program_is_where_the_tests_look() -> None:
    """The failures above must be the program's, not those of a missing one."""
    assert unionfs_mount("--version").stdout.startswith("unionfs-mount: version ")
    assert os.access(os.path.join(BIN, "unionfs"), os.X_OK)
