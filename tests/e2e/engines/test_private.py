"""The private root itself: it shows what is left in it, keeps it from the machine, and takes it down."""

from __future__ import annotations

import pwd
from pathlib import Path

import pytest

from tests.e2e.engines.private import SUB_IDS, USER, USER_ID, CommandFailedError, private_cell
from tests.support.sandbox import needs_root

pytestmark = [pytest.mark.engine]
needs_root()


def test_what_is_left_is_seen_and_then_gone() -> None:
    with private_cell() as cell:
        assert cell.wait_until_quiet(0) == ([], [])
        cell.shell("setsid sleep 1000 </dev/null >/dev/null 2>&1 & mkdir $1; mount -t tmpfs x $1", cell.root / "left")
        processes, mounts = cell.wait_until_quiet(0)
        assert [line.split()[2:] for line in processes] == [["sleep", "1000"]]
        assert mounts == [f"{cell.root}/left"]
        assert cell.files() == ["left"]
        daemon = cell.start("sleep", "1000", log=cell.root / "log")
        assert cell.stop(daemon) != 0
    assert not cell.root.exists()
    assert not [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if str(cell.root) in line]


def test_the_user_exists_only_here() -> None:
    with private_cell(etc={"storage.conf": "[storage]\n"}) as cell:
        assert cell.run("id", "-u", user=USER).stdout.decode().strip() == str(USER_ID)
        assert cell.shell("cat /etc/subuid /etc/subgid").split() == [f"{USER}:{SUB_IDS[0]}:{SUB_IDS[1]}"] * 2
        assert cell.shell("ls /etc/containers").split() == ["policy.json", "storage.conf"]
        # What the mount program needs: the device, itself, and a namespace with many ids.
        assert cell.run("unionfs-mount", "--version", user=USER).returncode == 0
        cell.shell(": <>/dev/fuse; echo 1 >~/file; test $XDG_RUNTIME_DIR -ef /run/user/$UID", user=USER)
        with pytest.raises(CommandFailedError, match="no such thing"):
            cell.shell("echo no such thing >&2; exit 3")
    with pytest.raises(KeyError):
        pwd.getpwnam(USER)
