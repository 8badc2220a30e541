"""Containers in the background with real runtimes: started, looked at, entered, stopped; limits, pulls and volumes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.engines.private import REPOSITORY, USER, Cell, private_cell
from tests.e2e.engines.terminal import terminal
from tests.e2e.engines.test_run import add_images, image_tar
from tests.support.mounts import wait_until

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(os.geteuid() != 0 or not os.path.exists("/dev/fuse"), reason="needs root and /dev/fuse"),
]

# Ends when it is asked to, and not at once.
LISTENS = "trap 'echo asked; exit 7' TERM; echo begun; sleep 0.3; echo wrong >&2; while :; do sleep 0.1; done"


@pytest.fixture(scope="module", params=["crun", "runc"])
def cell(request: pytest.FixtureRequest) -> Iterator[Cell]:
    """A private root with images; at the end nothing may be left in it but these."""
    with private_cell() as made:
        made.environment |= {"UNIONFS_ROOT": f"{made.root}/store", "UNIONFS_RUNTIME": request.param}
        made.environment |= {"PYTHONPATH": f"{REPOSITORY}"}
        made.shell("umount /sys/fs/cgroup/unified 2>/dev/null || true")
        made.call(lambda: add_images(f"{made.root}/store", image_tar()))
        yield made


@pytest.fixture(autouse=True)
def nothing_is_left(cell: Cell) -> Iterator[None]:
    """Each test leaves no process, no mount, no container and no volume."""
    yield
    for name in [one["name"] for one in told(cell, "container", "ls")]:
        cell.run("unionfs", "container", "rm", "--force", name)
    cell.assert_quiet()
    assert told(cell, "volume", "ls") == []
    assert list(Path(f"{cell.root}/store/image/unionfs/containers").glob("*")) == []


def told(cell: Cell, *words: str, user: str | None = None) -> Any:
    return json.loads(cell.run("unionfs", *words, "--json", user=user).stdout)


def said(cell: Cell, *words: str, user: str | None = None) -> str:
    done = cell.run("unionfs", *words, user=user)
    assert done.stderr == b""
    return done.stdout.decode()


def refused(cell: Cell, *words: str, status: int = 1) -> str:
    """What it says; one line."""
    done = cell.run("unionfs", *words, check=False)
    assert done.returncode == status, done
    text = done.stderr.decode()
    assert text.startswith("unionfs: ")
    assert text.count("\n") == 1, text
    return text


def wait_for_log(cell: Cell, name: str, text: str, user: str | None = None) -> None:
    assert wait_until(lambda: text in said(cell, "container", "logs", name, user=user), 30)


def test_from_its_start_to_its_end(cell: Cell) -> None:
    # The end of its output is waited for too: nobody who stays may hold it.
    assert said(cell, "run", "-d", "--name", "web", "plain", "sh", "-c", LISTENS) == "web\n"
    wait_for_log(cell, "web", "wrong")
    assert said(cell, "container", "logs", "web") == "begun\nwrong\n"
    assert said(cell, "container", "logs", "--tail", "1", "web") == "wrong\n"
    (facts,) = told(cell, "container", "ps")
    assert (facts["name"], facts["image"], facts["state"], facts["status"]) == ("web", "plain", "running", None)
    assert "running" in said(cell, "container", "ps")
    assert told(cell, "container", "inspect", "web")[0]["mounted"] is True
    assert "state: running" in said(cell, "container", "inspect", "web")
    assert "container web is running; stop it" in refused(cell, "container", "rm", "web")
    assert "container web is running" in refused(cell, "container", "start", "-d", "web", status=125)

    assert said(cell, "container", "stop", "web") == ""
    assert told(cell, "container", "ps") == []
    (facts,) = told(cell, "container", "ps", "--all")
    assert (facts["state"], facts["status"]) == ("exited 7", 7)
    assert facts["created"] <= facts["started"] <= facts["ended"]
    assert said(cell, "container", "logs", "web") == "begun\nwrong\nasked\n"
    cell.assert_quiet()
    assert "container web is not running" in refused(cell, "container", "stop", "web")
    done = cell.run("unionfs", "container", "stop", "nosuch", "web", check=False)
    assert [line.partition(b";")[0] for line in done.stderr.splitlines()] == [
        b"unionfs: there is no container nosuch",
        b"unionfs: container web is not running",
    ]
    assert "container web is not running" in refused(cell, "container", "exec", "web", "true", status=125)

    assert said(cell, "container", "start", "-d", "web") == "web\n"
    assert wait_until(lambda: said(cell, "container", "logs", "web").count("begun") == 2, 30)
    cell.run("unionfs", "container", "rm", "--force", "web")
    assert told(cell, "container", "ps", "-a") == []


def test_it_survives_the_terminal(cell: Cell) -> None:
    argv = cell._argv(
        ["sh", "-c", f'unionfs run -d --name tty plain sh -c "{LISTENS}"; exec sleep 100'], None, None, None
    )
    with terminal(argv) as screen:
        screen.wait_for("tty")
    assert told(cell, "container", "ps")[0]["name"] == "tty"
    cell.run("unionfs", "container", "stop", "tty")


def test_one_that_ends_by_itself(cell: Cell) -> None:
    assert said(cell, "run", "-d", "--name", "short", "plain", "sh", "-c", "echo done; exit 3") == "short\n"
    assert wait_until(lambda: told(cell, "container", "ps", "-a")[0]["state"] == "exited 3", 30)
    assert said(cell, "container", "logs", "--follow", "short") == "done\n"
    assert said(cell, "run", "-d", "--rm", "plain", "true").strip()
    assert wait_until(lambda: [one["name"] for one in told(cell, "container", "ls")] == ["short"], 30)


def test_what_cannot_be_started(cell: Cell) -> None:
    """It is said at once, with the same statuses as in the foreground."""
    for words, status, message in (
        (["plain", "nothere"], 127, "command not found"),
        (["plain", "/etc/plain"], 126, "cannot execute"),
        (["--pull", "never", "nosuch"], 125, "no such image: nosuch"),
        (["-t", "plain"], 125, "has no terminal"),
        (["-w", "/etc/passwd", "plain"], 125, "working directory"),
    ):
        assert message in refused(cell, "run", "-d", *words, status=status)
    assert told(cell, "container", "ls") == []


def test_interrupted_before_it_is_started(cell: Cell) -> None:
    """Nothing is started later: ^C while the store is in use."""
    held = cell.start(
        "flock", f"{cell.root}/store/image/unionfs/layerdb/lock", "sleep", "100", log=cell.root / "tmp/held"
    )
    log = cell.root / "tmp/interrupted"
    log.unlink(missing_ok=True)
    starting = cell.start("unionfs", "run", "-d", "--name", "never", "plain", "sleep", "100", log=log)
    # Whoever is in the background says what it has to say at the end.
    assert wait_until(lambda: len(cell.run("pgrep", "-f", "name never").stdout.split()) > 2, 30)
    assert cell.stop(starting, signal.SIGINT) == 130
    cell.stop(held, signal.SIGKILL)
    cell.run("pkill", "-f", "sleep 100", check=False)
    cell.assert_quiet()
    assert told(cell, "container", "ls") == []


def test_the_log_is_followed(cell: Cell) -> None:
    said(cell, "run", "-d", "--name", "f", "plain", "sh", "-c", "echo one; sleep 1; echo two; exit 0")
    assert said(cell, "container", "logs", "-f", "f") == "one\ntwo\n"
    cell.run("unionfs", "run", "--name", "fg", "plain", "true")
    assert "container fg has no log" in refused(cell, "container", "logs", "fg")
    assert "there is no container nosuch" in refused(cell, "container", "logs", "nosuch")


def test_stop(cell: Cell) -> None:
    said(cell, "run", "-d", "--name", "deaf", "plain", "sleep", "1000")
    cell.run("unionfs", "container", "stop", "-t", "0.5", "deaf")
    assert told(cell, "container", "ps", "-a")[0]["status"] == 128 + signal.SIGKILL
    said(cell, "run", "-d", "--name", "usr", "plain", "sh", "-c", LISTENS.replace("TERM", "USR1"))
    wait_for_log(cell, "usr", "begun")
    cell.run("unionfs", "container", "stop", "-s", "SIGUSR1", "usr", "--time", "20")
    assert told(cell, "container", "inspect", "usr")[0]["status"] == 7


def test_exec(cell: Cell) -> None:
    said(cell, "run", "-d", "--name", "x", "-e", "OF=container", "--hostname", "box", "plain", "sh", "-c", LISTENS)
    script = "echo $OF $MORE $HOSTNAME; id; pwd; cat"
    words = ["container", "exec", "-i", "-e", "MORE=1", "-u", "app", "-w", "/tmp", "x", "sh", "-c", script]
    done = cell.run("unionfs", *words, stdin=b"given")
    assert done.stdout.decode() == (
        "container 1 box\nuid=1234(app) gid=2345(apps) groups=2345(apps),3456(media)\n/tmp\ngiven"
    )
    done = cell.run("unionfs", "container", "exec", "x", "sh", "-c", "echo err >&2; exit 9", check=False)
    assert (done.returncode, done.stdout, done.stderr) == (9, b"", b"err\n")
    assert "command not found" in refused(cell, "container", "exec", "x", "nothere", status=127)
    # It is in there with the others.
    assert "sh -c trap" in said(cell, "container", "exec", "x", "sh", "-c", "cat /proc/1/cmdline | tr '\\0' ' '")
    argv = cell._argv(["unionfs", "container", "exec", "-it", "x", "sh"], None, None, None)
    with terminal(argv, 31, 77) as screen:
        screen.wait_for("# ")
        screen.type("test -t 0 && echo 'ter''minal'; exit 5\r")
        screen.wait_for("terminal")
        assert screen.wait() == 5
    cell.run("unionfs", "container", "rm", "-f", "x")


def test_the_death_of_its_runner(cell: Cell) -> None:
    said(cell, "run", "-d", "--name", "o", "plain", "sh", "-c", LISTENS)
    cell.run("kill", "-KILL", str(told(cell, "container", "ps")[0]["runner"]))
    cell.assert_quiet()
    assert told(cell, "container", "ps") == []
    cell.run("unionfs", "container", "rm", "o")


# Limits


def test_limits(cell: Cell) -> None:
    """As the control groups say, whichever version."""
    look = (
        "cat /sys/fs/cgroup/memory/memory.limit_in_bytes /sys/fs/cgroup/memory.max 2>/dev/null;"
        "cat /sys/fs/cgroup/cpu/cpu.cfs_quota_us /sys/fs/cgroup/cpu.max 2>/dev/null;"
        "cat /sys/fs/cgroup/pids/pids.max /sys/fs/cgroup/pids.max 2>/dev/null; true"
    )
    words = ["run", "--rm", "--memory", "64m", "--cpus", "0.5", "--pids-limit", "20", "plain", "sh", "-c", look]
    assert said(cell, *words).split()[:3] == [str(64 << 20), "50000", "20"]
    for wrong, message in (
        (["--memory", "lots"], "invalid size"),
        (["--memory", "1k"], "less than 6m"),
        (["--cpus", "1000"], "this machine has"),
    ):
        assert message in refused(cell, "run", *wrong, "plain", status=125)
    hide = "mount -t tmpfs none /sys/fs/cgroup; exec unionfs run --rm --memory 64m plain true"
    done = cell.run("unshare", "--mount", "sh", "-c", hide, check=False)
    assert (done.returncode, done.stderr.count(b"\n")) == (125, 1)
    assert b"--memory: this machine has no cgroup controller memory" in done.stderr


# Volumes


def test_named_volumes(cell: Cell) -> None:
    # A new one has what the image has there, owners included.
    assert said(cell, "run", "--rm", "-v", "data:/etc", "plain", "ls", "/etc").split() == ["group", "passwd", "plain"]
    said(cell, "run", "--rm", "-v", "data:/mnt:z", "plain", "sh", "-c", "echo kept > /mnt/file")
    assert said(cell, "run", "--rm", "-v", "data:/x:ro,Z", "plain", "cat", "/x/file") == "kept\n"
    (volume,) = told(cell, "volume", "ls")
    assert volume == {"name": "data", "path": f"{cell.root}/store/volumes/data/_data", "containers": []}
    said(cell, "run", "-d", "--name", "user", "-v", "data:/x", "plain", "sh", "-c", LISTENS)
    assert "volume data is used by container user" in refused(cell, "volume", "rm", "data")
    assert "user" in said(cell, "volume", "ls")
    assert {"kind": "volume", "name": "data"}.items() <= told(cell, "df")["things"][-1].items()
    cell.run("unionfs", "container", "rm", "-f", "user")
    assert said(cell, "volume", "rm", "data") == ""
    assert "there is no volume data" in refused(cell, "volume", "rm", "data")
    assert "a name has letters" in refused(cell, "run", "-v", "-x:/y", "plain", status=125)


# As an ordinary user


def test_an_ordinary_user(cell: Cell) -> None:
    store = {"UNIONFS_ROOT": f"{cell.root}/home/store"}
    archive = cell.root / "tmp/layer.tar"
    archive.write_bytes(image_tar())

    def own(*words: str, check: bool = True) -> subprocess.CompletedProcess[bytes]:
        return cell.run("unionfs", *words, user=USER, env=store, check=check)

    enter = ["unshare", "--map-root-user", "--map-auto", "--mount", "unionfs", "layer", "register", str(archive)]
    layer = cell.run(*enter, user=USER, env=store).stdout.decode().strip()
    assert own("run", "-d", "--name", "mine", "--layer", layer, "/bin/sh", "-c", LISTENS).stdout == b"mine\n"
    assert wait_until(lambda: b"wrong" in own("container", "logs", "mine").stdout, 30)
    assert json.loads(own("container", "ps", "--json").stdout)[0]["state"] == "running"
    assert own("container", "exec", "mine", "/bin/id").stdout.startswith(b"uid=0(root)")
    assert own("container", "exec", "mine", "/bin/sh", "-c", "exit 4", check=False).returncode == 4
    own("container", "stop", "mine")
    assert json.loads(own("container", "ps", "-a", "--json").stdout)[0]["state"] == "exited 7"
    assert own("container", "start", "-d", "mine").stdout == b"mine\n"
    own("container", "rm", "--force", "mine")
    cell.assert_quiet()
    done = own("run", "--rm", "--memory", "64m", "--layer", layer, "/bin/true", check=False)
    assert (done.returncode, done.stderr.count(b"\n")) == (125, 1)
    assert b"systemd-run --user --scope" in done.stderr
