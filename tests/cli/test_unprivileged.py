"""Mounts by a user who is not root: through fusermount3, and as root of an own user namespace."""

from __future__ import annotations

import json
import os
import signal
import stat
from collections.abc import Iterator

import pytest

from tests.cli.programs import BIN, Done, layer_options, run
from tests.support.layers import OLD_NS
from tests.support.mounts import mount_program, servers_of, wait_until
from tests.support.sandbox import Sandbox, needs_root

pytest_plugins = ["tests.support.sandbox"]
needs_root()

USER = 65534
WITHOUT_SESSION = f"/tmp/unionfs-{USER}"


@pytest.fixture
def layers(box: Sandbox) -> Iterator[Sandbox]:
    """A sandbox whose upper, work directory and target belong to the user."""
    box.lower().file("name", b"text", owner=(USER, USER)).file("secret", b"text", mode=0o600)
    for path in (str(box.upper), str(box.work), box.target, box.new_dir("run")):
        os.chown(path, USER, USER)
    was_there = os.path.exists(WITHOUT_SESSION)
    yield box
    if not was_there and os.path.exists(WITHOUT_SESSION):
        os.rmdir(WITHOUT_SESSION)
    # What a failed test leaves is mounted in a namespace that only its server keeps.
    for pid in servers_of(box.target):
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: servers_of(box.target) == (), 10)


def as_user(
    box: Sandbox,
    script: str,
    namespace: str = "",
    *,
    before: str = ":",
    capabilities: str = "--inh-caps=-all",
) -> Done:
    """Run ``script`` as the user, who may open /dev/fuse, in a mount namespace of its own; ``before`` as root."""
    node = f"{box.root}/fuse"
    os.mknod(node, stat.S_IFCHR | 0o600, os.makedev(10, 229))
    os.chmod(node, 0o666)
    become = f"setpriv --reuid {USER} --regid {USER} --clear-groups {capabilities} {namespace}"
    outer = f'mount --bind {node} /dev/fuse && {before} && exec {become} sh -ec "$1"'
    words = ["unshare", "-m", "--propagation", "private", "sh", "-c", outer, "sh", script]
    return run(words, env={"XDG_RUNTIME_DIR": f"{box.root}/run", "PATH": f"{BIN}:{os.environ['PATH']}"})


def test_user(layers: Sandbox) -> None:
    done = as_user(
        layers,
        f"unionfs-mount -o {layer_options(layers)} {layers.target}; ls {layers.target}; "
        f"echo new > {layers.target}/name; "
        f"cat {layers.target}/secret 2>/dev/null || echo refused; "
        f"unionfs mounts --json > {layers.root}/run/json; grep {layers.target} /proc/self/mountinfo; "
        f"unionfs umount {layers.target}; cat {layers.upper}/name",
    )
    assert (done.returncode, done.stderr) == (0, "")
    *names, refused, table, new = done.stdout.splitlines()
    assert (names, refused, new) == (["name", "secret"], "refused", "new")
    assert " nosuid,nodev," in table.replace("rw,", " ", 1)
    assert f"user_id={USER}" in table
    assert "allow_other" not in table
    with open(f"{layers.root}/run/json", encoding="utf-8") as file:
        (found,) = [mount for mount in json.load(file) if mount["target"] == layers.target]
    assert found["state"] == "serving"
    # umount has waited for its end, and the record went with it.
    assert servers_of(layers.target) == ()
    assert os.listdir(f"{layers.root}/run/unionfs") == []


@pytest.mark.parametrize("namespace", ["", "unshare --user --map-root-user --mount"])
def test_user_without_a_session(layers: Sandbox, namespace: str) -> None:
    """As after su: the mount is known all the same, also to a shell of a session, and its end is waited for."""
    done = as_user(
        layers,
        f"unset XDG_RUNTIME_DIR; unionfs-mount -o {layer_options(layers)} {layers.target}; ls {layers.target}; "
        f"unionfs mounts --json > {layers.root}/run/json; "
        f"XDG_RUNTIME_DIR={layers.root}/run unionfs mounts | grep -c {layers.target}; "
        f"touch {layers.target}/new; unionfs umount {layers.target}",
        namespace,
        before="mount -t tmpfs -o mode=1777 none /tmp" if not layers.root.startswith("/tmp/") else ":",
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == ["name", "secret", "1"]
    with open(f"{layers.root}/run/json", encoding="utf-8") as file:
        (found,) = [mount for mount in json.load(file) if mount["target"] == layers.target]
    assert (found["state"], found["upperdir"]) == ("serving", layers.upper)
    assert servers_of(layers.target) == ()


def test_a_directory_of_somebody_else_is_not_used(layers: Sandbox) -> None:
    """Anybody may make one in /tmp: what lies there is not believed, and nothing is written to it."""
    place = WITHOUT_SESSION
    done = as_user(
        layers,
        f"unset XDG_RUNTIME_DIR; unionfs-mount -o {layer_options(layers)} {layers.target}; "
        f"unionfs mounts --json; ls {place}; unionfs umount {layers.target}",
        before=f"mkdir -p {layers.root}/theirs {place} && mount --bind {layers.root}/theirs {place} && "
        f"chmod 777 {place}",
    )
    assert (done.returncode, done.stderr) == (0, "")
    # Nor does "ls" say anything.
    (found,) = [mount for mount in json.loads(done.stdout) if mount["target"] == layers.target]
    assert found["state"] == "unknown"
    assert wait_until(lambda: servers_of(layers.target) == (), 10)


def test_limit_that_the_user_cannot_raise(layers: Sandbox) -> None:
    """It holds for what is written through the mount too; the server goes on."""
    done = as_user(
        layers,
        f"(ulimit -f 16; unionfs-mount -o {layer_options(layers)} {layers.target}); cd {layers.target}; "
        "head -c 4096 /dev/zero > small; head -c 100000 /dev/zero > large || true; ls; stat -c %s small; "
        f"cd /; unionfs umount {layers.target}",
    )
    warned, refused = done.stderr.splitlines()
    assert warned.endswith("no file can become larger than 8192 bytes, which is this user's limit; see ulimit -Hf")
    assert "File too large" in refused or "Input/output error" in refused  # the kernel's cache tells it later
    assert (done.returncode, done.stdout.split()) == (0, ["large", "name", "secret", "small", "4096"])


def test_user_without_a_path(layers: Sandbox) -> None:
    """The program for that is found where systems have it; a name relative to the working directory is not taken."""
    os.symlink("/bin/false", f"{layers.root}/fusermount3")
    done = as_user(
        layers,
        f"cd {layers.root}; PATH=.: {mount_program()} -o {layer_options(layers)} {layers.target}; "
        f"ls {layers.target}; kill $(cat $XDG_RUNTIME_DIR/unionfs/*.json | sed 's/.*\"pid\": //; s/,.*//'); "
        f"while grep -q {layers.target} /proc/self/mountinfo; do sleep 0.05; done",
    )
    assert (done.returncode, done.stdout.split(), done.stderr) == (0, ["name", "secret"], "")
    assert wait_until(lambda: servers_of(layers.target) == (), 10)


def test_user_who_may_mount_by_himself(layers: Sandbox) -> None:
    """As Apptainer runs the program: an ordinary user with CAP_SYS_ADMIN, without PATH; he needs no fusermount3."""
    done = as_user(
        layers,
        f"env -i {mount_program()} -o {layer_options(layers)} {layers.target}; "
        f"ls {layers.target}; touch {layers.target}/new; umount {layers.target}",
        before=f"mount --bind /bin/false {os.path.realpath('/usr/bin/fusermount3')}",
        capabilities="--inh-caps=+sys_admin --ambient-caps=+sys_admin",
    )
    assert (done.returncode, done.stdout.split(), done.stderr) == (0, ["name", "secret"], "")
    assert os.stat(layers.in_upper("new")).st_uid == USER


@pytest.mark.parametrize("busy", [False, True], ids=["idle", "busy"])
def test_signal_unmounts_through_fusermount(layers: Sandbox, busy: bool) -> None:
    done = as_user(
        layers,
        f"unionfs-mount -o {layer_options(layers)} {layers.target}; "
        + (f"exec 7> {layers.target}/held; echo held >&7; " if busy else "")
        + "kill $(cat $XDG_RUNTIME_DIR/unionfs/*.json | grep -o '\"pid\": [0-9]*' | grep -o '[0-9]*$'); "
        f"n=0; while grep -q {layers.target} /proc/self/mountinfo && test $n -lt 100; "
        "do sleep 0.1; n=$((n+1)); done; "
        f"! grep {layers.target} /proc/self/mountinfo; " + ("echo later >&7; exec 7>&-" if busy else ""),
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert wait_until(lambda: servers_of(layers.target) == (), 10)
    if busy:
        with open(layers.in_upper("held"), encoding="utf-8") as file:
            assert file.read() == "held\nlater\n"


def test_root_of_a_user_namespace(layers: Sandbox) -> None:
    """As rootless podman runs the program: effective user id 0, and none of root's rights outside."""
    done = as_user(
        layers,
        f"unionfs-mount -o {layer_options(layers)} {layers.target}; ls -ln {layers.target}/name | cut -d' ' -f3; "
        f"rm {layers.target}/name; mkdir {layers.target}/d; grep {layers.target} /proc/self/mountinfo; "
        f"umount {layers.target}",
        namespace="unshare -Urm",
    )
    assert (done.returncode, done.stderr) == (0, "")
    owner, table = done.stdout.splitlines()
    assert owner == "0"
    assert "allow_other" in table
    assert wait_until(lambda: servers_of(layers.target) == (), 10)
    assert sorted(os.listdir(layers.in_upper())) != ["d"], "the removed file is not marked"


def test_files_of_others_that_are_shown_as_ones_own(layers: Sandbox) -> None:
    """squash_to_uid: a copy cannot have the owner that nobody sees."""
    lower = layers.lower()
    for name in ("a", "b", "c", "d/e/f", "d/g"):
        lower.file(name, b"text\n")
    lower.symlink("link", "a").link("a2", "a")
    squash = f"squash_to_uid={USER},squash_to_gid={USER}"
    done = as_user(
        layers,
        f"unionfs-mount -o {layer_options(layers)},{squash} {layers.target}; cd {layers.target}; "
        "stat -c %u:%g a d link; "
        "chmod 750 a; echo more >> b; mv c c0; touch d/e/new; rm -r d/e; mv d d1; touch -d @9 a2; ln c0 c1; rm link; "
        f"stat -c '%n %a %u %Y' a; cat b c1 d1/g; ls; cd /; unionfs umount {layers.target}",
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == [
        *[f"{USER}:{USER}"] * 3,
        *["a", "750", str(USER), "9", "text", "more", "text", "text"],
        *["a", "a2", "b", "c0", "c1", "d1", "name", "secret"],
    ]
    assert {os.lstat(layers.in_upper(name)).st_uid for name in ("a", "b", "c0", "d1")} == {USER}


def test_directories_that_their_owner_may_not_write(layers: Sandbox) -> None:
    """Module caches and package stores are such. Files in them may be changed, though their names may not."""
    lower = layers.lower()
    lower.dir("d", mode=0o555, owner=(USER, USER)).dir("d/e", mode=0o555, owner=(USER, USER))
    lower.file("d/f", b"text", owner=(USER, USER)).file("d/e/f", b"text", owner=(USER, USER))
    lower.file("d/e/g", b"text\n", mode=0o444, owner=(USER, USER)).link("d/e/k", "d/e/g")
    lower.symlink("d/e/l", "f", owner=(USER, USER))
    done = as_user(
        layers,
        f"unionfs-mount -o {layer_options(layers)} {layers.target}; cd {layers.target}; "
        "echo new > d/e/f; chmod 600 d/f; chmod 400 d/e/g; touch -h -d @9 d/e/l; "
        "rm -f d/f 2>/dev/null || echo refused; mkdir d/x 2>/dev/null || echo refused; "
        "mv d/e/f d/e/h 2>/dev/null || echo refused; "
        "stat -c '%a %n' d d/e d/f d/e/*; cat d/e/f d/e/g; stat -c %Y d d/e d/e/l; "
        # Whiteouts in a directory that may not be written, and that is then removed.
        "chmod u+w d d/e; rm d/e/*; chmod a-w d/e; rmdir d/e; mv d/f d/h; chmod a-w d; ls d; "
        f"cd /; unionfs umount {layers.target}",
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        *["refused"] * 3,
        *["555 d", "555 d/e", "600 d/f", "644 d/e/f", "400 d/e/g", "400 d/e/k", "777 d/e/l", "new", "text"],
        *[str(OLD_NS // 10**9)] * 2,
        *["9", "h"],
    ]
    assert stat.S_IMODE(os.stat(layers.in_upper("d")).st_mode) == 0o555
    assert os.listdir(f"{layers.work}/work") == []


def test_directories_that_their_owner_may_only_search(layers: Sandbox) -> None:
    """Names in them are found and changed as on any file system; an empty one can be removed or replaced."""
    lower, second = layers.lower(), layers.lower()
    for layer in (lower, second):
        for name in ("f", "g", "h", "i"):
            layer.file(f"x/{name}", name.encode(), owner=(USER, USER))
    second.file("x/low", b"low", owner=(USER, USER))
    # Hard links are looked for in everything, of which some is somebody else's.
    lower.file("x/one", b"1", owner=(USER, USER)).link("two", "x/one").dir("secrets", mode=0o700)
    for layer in (lower, second):
        layer.dir("x", mode=0o311, owner=(USER, USER))
    mount = f"unionfs-mount -o {layer_options(layers)} {layers.target}"
    done = as_user(
        layers,
        f"{mount}; cd {layers.target}; "
        # Of the upper layer alone.
        "mkdir a b c d e e/e; chmod a-rw a; rmdir a; chmod 0 b; rm -r b; chmod 0 d; mv -T c d; "
        "mv x/h e/e; chmod 311 e/e; rm e/e/h; chmod 0 e/e; rmdir e/e; mkdir f f/in; chmod 0 f; "
        "rmdir f 2>/dev/null || stat -c %a f; "
        # In lower ones.
        "cat x/f x/low; echo new > x/new; rm x/g; test ! -e x/g; echo >> two; cat x/one x/f; echo; "
        f"cd /; unionfs umount {layers.target}; {mount}; cd {layers.target}; "
        "cat x/f x/low x/new; test ! -e x/g; test ! -e x/none; test ! -e x/h; mv x/i x/j; cat x/j; echo; "
        "stat -c '%a %n' *; "
        f"cd /; unionfs umount {layers.target}",
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == [
        *["0", "flow1", "f", "flownew", "i"],
        *["755", "d", "755", "e", "0", "f", "644", "name", "600", "secret", "700", "secrets", "644", "two", "311", "x"],
    ]
