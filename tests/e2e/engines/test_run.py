"""``unionfs run`` with real runtimes: what the image says, what a person says, how it ends, what is left."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.engines.private import REPOSITORY, USER, USER_ID, Cell, private_cell
from tests.e2e.engines.terminal import terminal
from tests.support.mounts import is_running, wait_until
from unionfs.engines.images.reference import parse_reference
from unionfs.engines.images.store import ImageStore
from unionfs.layers import open_store

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(os.geteuid() != 0 or not os.path.exists("/dev/fuse"), reason="needs root and /dev/fuse"),
]

BUSYBOX = "/usr/bin/busybox"
APPLETS = "sh cat chown cut echo env grep hostname id ls mkdir mknod mount pwd rm sleep stty touch tr true tty unshare"
PASSWD = "root:x:0:0::/root:/bin/sh\napp:x:1234:2345::/home/app:/bin/sh\n"
GROUP = "root:x:0:\napps:x:2345:\nmedia:x:3456:app,root\nother:x:4567:root\n"
CONFIG = {
    "Env": ["PATH=/opt/bin:/bin", "FROM_IMAGE=yes", "BOTH=image"],
    "Entrypoint": ["/bin/echo", "entry"],
    "Cmd": ["cmd"],
    "User": "app",
    "WorkingDir": "/srv/work",
}
PLAIN = {"Env": ["PATH=/bin"], "Cmd": ["sh"]}


def image_tar() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:

        def add(name: str, data: bytes = b"", mode: int = 0o644, kind: bytes = tarfile.REGTYPE, link: str = "") -> None:
            info = tarfile.TarInfo(name)
            info.mode, info.type, info.linkname, info.size = mode, kind, link, len(data)
            tar.addfile(info, io.BytesIO(data))

        for name in ("bin", "etc", "root"):
            add(name, mode=0o755, kind=tarfile.DIRTYPE)
        add("tmp", mode=0o1777, kind=tarfile.DIRTYPE)
        add("bin/busybox", Path(BUSYBOX).read_bytes(), 0o4755)
        for applet in APPLETS.split():
            add(f"bin/{applet}", kind=tarfile.SYMTYPE, link="busybox")
        add("etc/passwd", PASSWD.encode())
        add("etc/group", GROUP.encode())
        add("etc/plain", b"no program")
        add("outside", kind=tarfile.SYMTYPE, link="/../../../../../../../../tmp")
    return out.getvalue()


def add_images(root: str, layer: bytes) -> None:
    with open_store(root) as store:
        made = store.register(io.BytesIO(layer))
        images = ImageStore(store)
        for name, config in (("plain", PLAIN), ("busybox", PLAIN), ("app", CONFIG), ("other", PLAIN)):
            text = {
                "os": "linux",
                "architecture": "amd64" if name != "other" else "s390x",
                "config": config,
                "rootfs": {"type": "layers", "diff_ids": [made.diff_id]},
            }
            images.add(json.dumps(text).encode(), [parse_reference(name)])


# For what does not depend on which one it is.
one_runtime = pytest.mark.parametrize("cell", ["crun"], indirect=True)


@pytest.fixture(scope="module", params=["crun", "runc"])
def cell(request: pytest.FixtureRequest) -> Iterator[Cell]:
    """A private root with two images in a store; at the end nothing may be left in it but these."""
    with private_cell() as made:
        made.environment |= {"UNIONFS_ROOT": f"{made.root}/store", "UNIONFS_RUNTIME": request.param}
        made.environment |= {"PYTHONPATH": f"{REPOSITORY}"}
        # crun refuses a mixture of cgroups v1 and v2, which some of the machines that test have.
        made.shell("umount /sys/fs/cgroup/unified 2>/dev/null || true")
        made.call(lambda: add_images(f"{made.root}/store", image_tar()))
        before = made.mounts()
        yield made
        assert not made.processes()
        assert made.mounts() == before
        assert json.loads(made.run("unionfs", "container", "ls", "--json").stdout) == []
        made.run("unionfs", "fsck", "--deep")
        assert os.listdir(f"{made.root}/store/image/unionfs/containers") == []


@pytest.fixture(autouse=True)
def nothing_is_left(cell: Cell) -> Iterator[None]:
    """Each test leaves no process and no mount."""
    yield
    cell.assert_quiet()


def run(cell: Cell, *words: str | Path, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    """``unionfs run --rm`` with these words."""
    return cell.run("unionfs", "run", "--rm", *words, stdin=stdin, check=False)


def said(cell: Cell, *words: str | Path, stdin: bytes = b"") -> str:
    """What the container wrote, which must have ended well and have written no error."""
    done = run(cell, *words, stdin=stdin)
    assert (done.returncode, done.stderr) == (0, b""), done
    return done.stdout.decode()


def containers(cell: Cell) -> list[str]:
    return [one["name"] for one in json.loads(cell.run("unionfs", "container", "ls", "--json").stdout)]


def started(cell: Cell, log: Path, *words: str) -> subprocess.Popen[bytes]:
    """``unionfs run`` with these words, in the background, once its container has said that it is ready."""
    daemon = cell.start("unionfs", "run", *words, log=log)
    assert wait_until(lambda: "ready" in log.read_text() or daemon.poll() is not None, 60)
    assert daemon.poll() is None, log.read_text()
    return daemon


# What is run


def test_the_image_says_what_is_run(cell: Cell) -> None:
    assert said(cell, "app") == "entry cmd\n"
    assert said(cell, "app", "other", "words") == "entry other words\n"
    assert said(cell, "--entrypoint", "pwd", "app") == "/srv/work\n"
    assert said(cell, "--entrypoint", "", "-w", "/tmp", "app", "pwd") == "/tmp\n"
    assert said(cell, "--entrypoint", "id", "app") == "uid=1234(app) gid=2345(apps) groups=2345(apps),3456(media)\n"
    assert said(cell, "-u", "77:88", "--entrypoint", "id", "app") == "uid=77 gid=88 groups=88\n"


@one_runtime
def test_variables(cell: Cell) -> None:
    file = cell.root / "tmp/variables"
    file.write_text("# a comment\n\nFROM_FILE=a b\nBOTH=file\n")
    words = ["-e", "BOTH=person", "-e", "LANG", "-e", "NOT_SET_HERE"]
    found = said(cell, *words, "--env-file", file, "--hostname", "box", "--entrypoint", "env", "app").splitlines()
    assert sorted(found) == sorted(
        [
            "PATH=/opt/bin:/bin",
            "HOSTNAME=box",
            "HOME=/home/app",
            "FROM_IMAGE=yes",
            "FROM_FILE=a b",
            "BOTH=person",
            "LANG=C.UTF-8",
        ]
    )


# Input and output


@one_runtime
def test_input_is_passed_on_when_asked_for(cell: Cell) -> None:
    data = os.urandom(3 << 20)
    done = run(cell, "-i", "plain", "cat", stdin=data)
    assert done.returncode == 0
    assert done.stdout == data
    assert run(cell, "plain", "cat", stdin=data).stdout == b""


def test_output_and_errors_are_kept_apart(cell: Cell) -> None:
    done = run(cell, "plain", "sh", "-c", "echo out; echo err >&2; exit 3")
    assert (done.returncode, done.stdout, done.stderr) == (3, b"out\n", b"err\n")


def test_a_terminal(cell: Cell) -> None:
    argv = cell._argv(["unionfs", "run", "--rm", "-it", "plain"], None, None, None)
    with terminal(argv, 31, 77) as screen:
        before = screen.settings()
        screen.wait_for("# ")
        assert screen.settings() != before, "keys go to us and not to the container's terminal"
        screen.type("stty size; tty; echo $TERM; test -t 0 && test -t 1 && echo 'ter''minal'\r")
        assert "31 77" in screen.wait_for("terminal")
        screen.resize(43, 99)
        # The change takes its way through the runtime, and nobody says when it has arrived.
        screen.type("until [ \"$(stty size)\" = '43 99' ]; do :; done; echo re''sized\r")
        screen.wait_for("resized")
        # ^C is for the container's shell, which goes on.
        screen.type("sh -c \"echo sleep''ing; sleep 1000\"\r")
        screen.wait_for("sleeping")
        screen.type("\x03")
        screen.wait_for("# ")
        screen.type("exit 5\r")
        assert screen.wait() == 5
        assert screen.settings() == before


@one_runtime
def test_a_terminal_is_needed_for_one(cell: Cell) -> None:
    done = run(cell, "-t", "plain", "true")
    assert done.returncode == 125
    assert done.stderr == b"unionfs: -t needs a terminal as standard input; leave it out\n"


# Ends


@one_runtime
@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["plain", "nothere"], 127, "command not found: nothere: it is not in PATH (/bin) in this image"),
        (["plain", "/etc/plain"], 126, "cannot execute /etc/plain: /etc/plain has no x permission in this image"),
        (
            ["--pull", "never", "nosuch"],
            125,
            "no such image: nosuch; unionfs image ls shows those that are here, unionfs image pull",
        ),
        (["-u", "nobody", "plain", "id"], 125, "user nobody: the container's /etc/passwd does not have it"),
        (["-v", "/nothere:/x", "plain"], 125, "volume /nothere:/x: there is no /nothere; make it first"),
        (["-v", "/tmp:/etc/passwd/x", "plain"], 125, "nothing can be mounted on /etc/passwd"),
        (["-w", "/etc/passwd", "plain"], 125, "working directory /etc/passwd: "),
        (["--entrypoint", "", "plain"], 125, "the image does not say what to run; write a command after it"),
        (["--no-such-option", "plain"], 2, "No such option"),
    ],
)
def test_exit_statuses_and_messages(cell: Cell, words: list[str], status: int, message: str) -> None:
    done = run(cell, *words)
    assert done.returncode == status, done.stderr
    text = done.stderr.decode()
    assert text.startswith(f"unionfs: {message}")
    assert text.count("\n") == 1, "one line"
    assert containers(cell) == []


@one_runtime
def test_an_image_for_another_machine(cell: Cell) -> None:
    """It is run all the same: its programs may be for this one, or there may be an emulator."""
    done = run(cell, "other", "echo", "here")
    assert (done.returncode, done.stdout) == (0, b"here\n")
    assert done.stderr.startswith(b"unionfs: warning: the image is for linux/s390x, but this machine is linux/amd64")
    assert done.stderr.count(b"\n") == 1


def test_a_missing_runtime_is_named(cell: Cell) -> None:
    runtime = cell.environment["UNIONFS_RUNTIME"]
    hide = f"mount --bind /dev/null $(command -v {runtime}); exec unionfs run --rm plain true"
    done = cell.run("unshare", "--mount", "sh", "-c", hide, check=False)
    assert done.returncode == 125
    assert done.stderr.decode() == f"unionfs: the program {runtime} is missing; install it: apt install {runtime}\n"


def test_a_signal_that_ends_the_process_is_told(cell: Cell) -> None:
    log = cell.root / "tmp/killed"
    daemon = started(cell, log, "--rm", "plain", "sh", "-c", "echo ready; exec sleep 1000")
    assert cell.run("pkill", "-KILL", "-x", "sleep").returncode == 0
    assert daemon.wait(60) == 128 + signal.SIGKILL


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signals_are_passed_on(cell: Cell, number: signal.Signals) -> None:
    name = number.name.removeprefix("SIG")
    log = cell.root / f"tmp/{name}"
    # A trap runs when the command that the shell waits for has ended.
    script = f"trap 'echo got {name}; exit 9' {name}; echo ready; while :; do sleep 0.1; done"
    daemon = started(cell, log, "--rm", "plain", "sh", "-c", script)
    assert cell.stop(daemon, number) == 9
    assert f"got {name}" in log.read_text()
    assert containers(cell) == []


def test_the_third_request_kills_a_container_that_does_not_listen(cell: Cell) -> None:
    log = cell.root / "tmp/deaf"
    script = "trap 'echo no' INT; echo ready; while :; do sleep 0.1; done"
    daemon = started(cell, log, "--rm", "plain", "sh", "-c", script)
    for count in (1, 2):
        cell.run("pkill", "-INT", "-f", "^[^ ]*python[^ ]* .*/unionfs run")
        assert wait_until(lambda count=count: log.read_text().count("no\n") == count, 60)  # type: ignore[misc]
    assert cell.stop(daemon, signal.SIGINT) == 128 + signal.SIGKILL


def test_a_process_one_of_its_own(cell: Cell) -> None:
    log = cell.root / "tmp/init"
    daemon = started(cell, log, "--rm", "--init", "plain", "sh", "-c", "echo ready; exec sleep 1000")
    # As process 1, sleep would ignore it.
    assert cell.stop(daemon, signal.SIGTERM) == 128 + signal.SIGTERM


# Files


def test_volumes(cell: Cell) -> None:
    shared = cell.root / "tmp/shared"
    shared.mkdir()
    (shared / "below").mkdir()
    (shared / "file").write_text("of the host\n")
    words = ["-v", f"{shared}:/data", "-v", f"{shared}/file:/etc/app/one:ro", "-v", f"{shared}:/ro:ro"]
    script = (
        "cat /data/file /etc/app/one; echo x >/ro/y || echo no; echo x >>/etc/app/one || echo no; echo made >/data/new"
    )
    done = run(cell, *words, "plain", "sh", "-c", script)
    assert done.stdout == b"of the host\nof the host\nno\nno\n"
    assert done.stderr.count(b"Read-only file system") == 2
    assert (shared / "new").read_text() == "made\n"
    assert (shared / "file").read_text() == "of the host\n"


@one_runtime
def test_a_relative_volume(cell: Cell) -> None:
    (cell.root / "tmp/here").mkdir()
    (cell.root / "tmp/here/name").write_text("found")
    words = ["unionfs", "run", "--rm", "-v", "./here:/x", "plain", "cat", "/x/name"]
    assert cell.run(*words, cwd=cell.root / "tmp").stdout == b"found"


def test_a_volume_on_a_link_stays_in_the_container(cell: Cell) -> None:
    outside = Path("/tmp/escaped")
    shared = cell.root / "tmp/linked"
    shared.mkdir()
    (shared / "name").write_text("in")
    assert said(cell, "-v", f"{shared}:/outside/escaped", "plain", "cat", "/tmp/escaped/name") == "in"
    assert not cell.call(outside.exists)


def test_a_read_only_container(cell: Cell) -> None:
    words = ["--read-only", "--tmpfs", "/tmp:size=1m,mode=1777"]
    script = "echo x >/x; echo x >/etc/hosts; mkdir /dev/shm/a && echo x >/tmp/x && cat /tmp/x; mount | grep ' /tmp '"
    done = run(cell, *words, "plain", "sh", "-c", script)
    assert done.stderr.count(b"Read-only file system") == 2
    assert done.stdout.startswith(b"x\n")
    assert b"size=1024k" in done.stdout


@one_runtime
def test_a_container_stays_until_it_is_removed(cell: Cell) -> None:
    first = "echo 1 >/made; rm /etc/plain; echo 2 >>/etc/passwd; echo x >/etc/hosts; exit 3"
    done = cell.run(
        "unionfs", "run", "--name", "kept", "-v", "/usr:/vol", "-w", "/new/dir", "plain", "sh", "-c", first, check=False
    )
    assert done.returncode == 3, done.stderr
    changes = cell.run("unionfs", "container", "diff", "kept").stdout.decode().splitlines()
    # Nothing of what the container was given by us: mount points and the files of its /etc.
    assert changes == ["C /etc", "C /etc/passwd", "D /etc/plain", "A /made", "A /new", "A /new/dir"]

    again = cell.run("unionfs", "run", "--name", "kept", "plain", "true", check=False)
    assert again.returncode == 125
    assert again.stderr == (
        b"unionfs: there is a container kept already; start it again with: unionfs container start kept, or remove it "
        b"with: unionfs container rm kept\n"
    )
    cell.run("unionfs", "container", "start", "kept", check=False)
    assert cell.run("unionfs", "container", "diff", "kept").stdout.decode().splitlines() == changes

    made = cell.run("unionfs", "container", "commit", "kept").stdout.decode().strip()
    assert said(cell, "--layer", made, "cat", "/made") == "1\n"
    with tarfile.open(fileobj=io.BytesIO(cell.run("unionfs", "container", "export", "kept").stdout)) as tar:
        assert "made" in {name.removeprefix("./") for name in tar.getnames()}
    cell.run("unionfs", "container", "rm", "kept")
    cell.run("unionfs", "layer", "rm", made)
    assert cell.run("unionfs", "container", "start", "kept", check=False).returncode == 125


@one_runtime
def test_a_container_of_something_else_cannot_be_started(cell: Cell) -> None:
    cell.run("unionfs", "container", "create", "--name", "other")
    done = cell.run("unionfs", "container", "start", "other", check=False)
    assert done.returncode == 125
    assert done.stderr.startswith(b"unionfs: container other was not made by unionfs run")
    cell.run("unionfs", "container", "rm", "other")


# Isolation


def test_what_a_container_sees(cell: Cell) -> None:
    script = "echo $$; hostname; grep -c box /etc/hosts; ls /sys/class/net; cat /etc/resolv.conf /proc/keys"
    assert said(cell, "--hostname", "box", "--network", "none", "plain", "sh", "-c", script) == "1\nbox\n1\nlo\n"


def test_what_a_container_may_do(cell: Cell) -> None:
    done = run(cell, "plain", "unshare", "-U", "true")
    assert done.returncode != 0, "user namespaces are refused"
    assert b"Operation not permitted" in done.stderr
    assert said(cell, "--no-seccomp", "plain", "unshare", "-U", "true") == ""
    status = "grep -E '^(CapEff|CapBnd|NoNewPrivs)' /proc/self/status | tr -d '[:space:]'"
    default = "CapEff:{0}CapBnd:{1}NoNewPrivs:{2}"
    assert said(cell, "plain", "sh", "-c", status) == default.format("00000000a80425fb", "00000000a80425fb", 0)
    assert said(cell, "-u", "app", "plain", "sh", "-c", status) == default.format("0" * 16, "00000000a80425fb", 0)
    # It may make any device, and open none but the usual ones.
    device = "mknod /tmp/fuse c 10 229 || exit; cat /tmp/fuse || echo refused; cat /dev/null && echo opened"
    assert run(cell, "plain", "sh", "-c", device).stdout == b"refused\nopened\n"
    few = ["--cap-drop", "all", "--cap-add", "CAP_CHOWN", "--no-new-privileges"]
    assert said(cell, *few, "plain", "sh", "-c", status) == default.format("0" * 15 + "1", "0" * 15 + "1", 1)


# Side by side, and after a crash


@one_runtime
def test_twenty_at_once(cell: Cell) -> None:
    found: list[subprocess.CompletedProcess[bytes]] = []

    def one(number: int) -> None:
        script = f"echo {number} >/mine; cat /mine; exit {number}"
        found.append(cell.run("unionfs", "run", "--rm", "plain", "sh", "-c", script, check=False, timeout_s=240))

    threads = [threading.Thread(target=one, args=(number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(done.returncode for done in found) == list(range(20)), [done.stderr for done in found]
    assert all(done.stdout == b"%d\n" % done.returncode for done in found)
    assert containers(cell) == []


def start_long(cell: Cell, name: str, *words: str) -> subprocess.Popen[bytes]:
    log = cell.root / f"tmp/{name}.log"
    log.unlink(missing_ok=True)
    script = "echo kept >/file; echo ready; while :; do sleep 0.1; done"
    return started(cell, log, "--name", name, *words, "plain", "sh", "-c", script)


def runners(cell: Cell) -> list[int]:
    """The numbers, in the cell, of the processes of ``unionfs run``: one that runs, and its guard."""
    found = cell.run("pgrep", "-f", "^[^ ]*python[^ ]* .*/unionfs run").stdout
    return [int(word) for word in found.split()]


@one_runtime
def test_a_running_container_is_not_started_twice(cell: Cell) -> None:
    daemon = start_long(cell, "busy")
    done = cell.run("unionfs", "container", "start", "busy", check=False)
    assert done.returncode == 125
    assert done.stderr.startswith(b"unionfs: container busy is running")
    done = cell.run("unionfs", "container", "rm", "busy", check=False)
    assert done.returncode == 1
    assert b"busy" in done.stderr
    assert daemon.poll() is None
    cell.run("unionfs", "container", "rm", "--force", "busy")
    assert daemon.wait(60) == 128 + signal.SIGKILL
    assert containers(cell) == []


@pytest.mark.parametrize("words", [["--rm"], []])
def test_our_death_ends_the_container(cell: Cell, words: list[str]) -> None:
    daemon = start_long(cell, "orphan", *words)
    assert len(runners(cell)) == 2
    cell.stop(daemon, signal.SIGKILL)
    cell.assert_quiet()
    assert containers(cell) == ([] if words else ["orphan"])
    if not words:
        assert cell.run("unionfs", "container", "diff", "orphan").stdout == b"A /file\n"
        cell.run("unionfs", "container", "rm", "orphan")


@pytest.mark.parametrize("words", [["--rm"], []])
def test_the_next_one_cleans_up_when_the_guard_died_too(cell: Cell, words: list[str]) -> None:
    daemon = start_long(cell, "orphan", *words)
    cell.run("kill", "-KILL", *map(str, runners(cell)))
    daemon.wait(60)
    assert not is_running(daemon.pid)
    assert containers(cell) == ["orphan"], "nobody was there to remove it"
    if words:
        cell.run("unionfs", "gc")
        assert containers(cell) == []
    elif cell.environment["UNIONFS_RUNTIME"] == "crun":
        assert said(cell, "plain", "echo", "next") == "next\n"
        cell.assert_quiet()
        cell.run("unionfs", "container", "rm", "orphan")
    else:
        # Without --force, since it is running no more.
        cell.run("unionfs", "container", "rm", "orphan")


# As an ordinary user


@pytest.fixture(scope="module")
def own_layer(cell: Cell) -> str:
    """A layer in a store of the cell's ordinary user, made as docs/layer-store.md says."""
    archive = cell.root / "tmp/layer.tar"
    archive.write_bytes(image_tar())
    words = ["unshare", "--map-root-user", "--map-auto", "--mount", "unionfs", "layer", "register", str(archive)]
    return cell.run(*words, user=USER, env=own_store(cell)).stdout.decode().strip()


def own_store(cell: Cell) -> dict[str, str]:
    return {"UNIONFS_ROOT": f"{cell.root}/home/store"}


def own_containers(cell: Cell) -> list[str]:
    found = cell.run("unionfs", "container", "ls", "--json", user=USER, env=own_store(cell)).stdout
    return [one["name"] for one in json.loads(found)]


def test_an_ordinary_user(cell: Cell, own_layer: str) -> None:
    shared = cell.root / "home/shared"
    shared.mkdir()
    os.chown(shared, USER_ID, USER_ID)
    script = "id -u; id -u app; echo x >/data/file; touch /made; chown app /made; ls -n /made | cut -c1-20; cat; exit 3"
    words = ["unionfs", "run", "--rm", "-i", "-v", f"{shared}:/data", "--layer", own_layer, "sh", "-c", script]
    done = cell.run(*words, user=USER, env=own_store(cell), stdin=b"input\n", check=False)
    assert (done.returncode, done.stderr) == (3, b"")
    assert done.stdout.startswith(b"0\n1234\n-rw-r--r--")
    assert done.stdout.endswith(b"input\n")
    assert (shared / "file").stat().st_uid == USER_ID, "root of the container is the user"
    assert own_containers(cell) == []


@one_runtime
def test_signals_reach_an_ordinary_users_container(cell: Cell, own_layer: str) -> None:
    log = cell.root / "tmp/rootless"
    script = "trap 'exit 9' TERM; echo ready; while :; do sleep 0.1; done"
    daemon = cell.start(
        "unionfs", "run", "--rm", "--layer", own_layer, "sh", "-c", script, log=log, user=USER, env=own_store(cell)
    )
    assert wait_until(lambda: "ready" in log.read_text() or daemon.poll() is not None, 60)
    assert cell.stop(daemon, signal.SIGTERM) == 9, log.read_text()


@one_runtime
def test_the_death_of_an_ordinary_users_container(cell: Cell, own_layer: str) -> None:
    log = cell.root / "tmp/rootless-death"
    script = "echo ready; while :; do sleep 0.1; done"
    words = ["unionfs", "run", "--rm", "--layer", own_layer, "sh", "-c"]
    daemon = cell.start(*words, script, log=log, user=USER, env=own_store(cell))
    assert wait_until(lambda: "ready" in log.read_text() or daemon.poll() is not None, 60)
    cell.stop(daemon, signal.SIGKILL)
    cell.assert_quiet()
    assert len(own_containers(cell)) == 1, "nobody was there to remove it"
    cell.run(*words, "true", user=USER, env=own_store(cell))
    assert own_containers(cell) == []


@one_runtime
def test_an_ordinary_user_without_ids(cell: Cell, own_layer: str) -> None:
    hide = f"mount --bind /dev/null /etc/subuid; exec setpriv --reuid={USER_ID} --regid={USER_ID} --clear-groups -- "
    hide += f"unionfs run --rm --layer {own_layer} true"
    done = cell.run("unshare", "--mount", "sh", "-c", hide, env=own_store(cell), check=False)
    assert done.returncode == 125
    assert done.stderr.startswith(b"unionfs: user e2e has no id range in /etc/subuid; run: sudo usermod --add-subuids")
