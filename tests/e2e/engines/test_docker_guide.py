"""docs/docker.md, followed word for word."""

from __future__ import annotations

import configparser
import json
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.e2e.engines import awkward_image
from tests.e2e.engines.awkward_image import TAG
from tests.e2e.engines.private import REPOSITORY, Cell, private_cell
from tests.support.sandbox import needs_root

pytestmark = [pytest.mark.engine]
needs_root()

GUIDE = (REPOSITORY / "docs/docker.md").read_text()
SECTIONS = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", GUIDE, re.DOTALL | re.MULTILINE))
# There is no network in the cell, and this kernel may have no iptables.
OF_THIS_MACHINE = {"iptables": False, "ip6tables": False, "bridge": "none"}


def commands(section: str) -> list[str]:
    """All commands of a section."""
    return "".join(re.findall(r"^```sh\n(.*?)^```", SECTIONS[section], re.DOTALL | re.MULTILINE)).splitlines()


def files(section: str) -> dict[str, str]:
    """The files of a section by their paths."""
    return dict(re.findall(r"^`(\S+)`:\n\n```\w+\n(.*?)^```", SECTIONS[section], re.DOTALL | re.MULTILINE))


def configure(cell: Cell, config: dict[str, object]) -> None:
    cell.shell('mkdir -p /etc/docker; echo "$1" >/etc/docker/daemon.json', json.dumps({**config, **OF_THIS_MACHINE}))


def documented_config(section: str) -> dict[str, object]:
    ((path, text),) = files(section).items()
    assert path == "/etc/docker/daemon.json"
    config: dict[str, object] = json.loads(text)
    return config


@contextmanager
def machine() -> Iterator[Cell]:
    """Where Docker has its usual places, and ``unionfs`` is installed."""
    with private_cell() as cell:
        cell.shell("mount -t tmpfs bin /usr/local/bin")
        setup, link = commands("Install")
        assert setup == "scripts/setup"  # has been run by whoever runs the tests
        cell.shell(f"cd {REPOSITORY}; {link}")
        yield cell
        cell.shell("umount /usr/local/bin")
        cell.shell("! mountpoint -q /var/lib/docker/plugins || umount /var/lib/docker/plugins")
        cell.assert_quiet()


@contextmanager
def started(cell: Cell, *lines: str) -> Iterator[None]:
    """The daemons of these lines ("program arguments &"), of which the last is dockerd."""
    daemons = []
    for line in lines:
        assert line.endswith(" &")
        daemons.append(cell.start(*line.removesuffix(" &").split(), log=cell.root / "log"))
    end = time.monotonic() + 60
    while cell.run("docker", "info", check=False).returncode != 0 or "ERROR" in cell.shell("docker info 2>&1"):
        assert time.monotonic() < end, (cell.root / "log").read_text()[-3000:]
        time.sleep(0.1)
    yield
    for daemon in reversed(daemons):
        assert cell.stop(daemon) == 0


def load(cell: Cell) -> None:
    image = awkward_image.build(cell.root / "image")
    cell.shell(f"docker load -q -i {image.archive}; docker tag {TAG} busybox")


def assert_used(cell: Cell) -> None:
    info, mount = cell.shell("\n".join(commands("See that it is used"))).splitlines()
    assert info.startswith("unionfs [[unionfs version ")
    assert mount.startswith("unionfs on / type fuse.unionfs-mount (rw,")


def test_guide_without_systemd() -> None:
    with machine() as cell:
        configure(cell, documented_config("Configure"))
        with started(cell, *commands("Without systemd")):
            load(cell)
            assert_used(cell)
            cell.shell("docker rmi busybox $1", TAG)
        assert cell.shell("ls -A /run/docker/plugins /var/lib/docker/unionfs/l") == (
            "/run/docker/plugins:\n\n/var/lib/docker/unionfs/l:\n"
        )


def test_with_the_supervisor() -> None:
    with machine() as cell:
        configure(cell, documented_config("Configure"))
        with started(cell, *commands("Faster mounts"), *commands("Without systemd")):
            load(cell)
            cell.shell("docker run -d --network none --name one busybox sleep 1000")
            (mount,) = json.loads(cell.shell("unionfs mounts --json"))
            assert mount["supervised"] is True
            cell.shell("docker rm -f one; docker rmi busybox $1", TAG)


def test_units() -> None:
    """What systemd would do with the units, done by its own tools; systemd itself does not run here."""
    with machine() as cell:
        units = files("With systemd")
        parsed = {}
        for path, text in units.items():
            cell.shell('echo "$2" >"$1"', cell.root / "tmp" / path.rpartition("/")[2], text)
            unit = configparser.ConfigParser(strict=False, interpolation=None)
            unit.read_string(text)
            parsed[path.rpartition(".")[2]] = unit
        names = [str(cell.root / "tmp" / path.rpartition("/")[2]) for path in units]
        assert cell.shell('systemd-analyze verify --man=no "$@" 2>&1 | grep -F unionfs || true', *names) == ""
        configure(cell, documented_config("Configure"))
        path = parsed["socket"]["Socket"]["ListenStream"]
        command = parsed["service"]["Service"]["ExecStart"]
        cell.shell("mkdir -p /run/docker/plugins")
        with started(cell, f"systemd-socket-activate -l {path} {command} &", "dockerd &"):
            load(cell)
            assert_used(cell)
            cell.shell("docker rmi busybox $1", TAG)


def test_taking_along_what_is_there_and_back() -> None:
    there = commands("Taking along what is there")
    back = [
        re.sub("overlay2|unionfs", lambda m: {"overlay2": "unionfs", "unionfs": "overlay2"}[m[0]], x) for x in there
    ]
    plugin, engine = commands("Without systemd")
    plugin = plugin.replace(" &", " --storage-opt unionfs.redirect_dir=off &")
    with machine() as cell:
        configure(cell, {"storage-driver": "overlay2"})
        with started(cell, engine):
            load(cell)
            cell.shell("docker run --network none --name kept busybox sh -c 'echo mine >>/mine; rm -rf /d1'")
            exported = cell.shell("docker export kept | tar -t | sort")
        cell.shell("\n".join(there))
        configure(cell, documented_config("Configure"))
        with started(cell, plugin, engine):
            assert_used(cell)
            assert cell.shell("docker export kept | tar -t | sort") == exported
            assert cell.shell("docker diff kept").splitlines() == ["D /d1", "A /mine"]
            cell.shell("docker start -a kept")
            cell.shell("docker run --network none --name ours busybox mv /d3 /moved")
        cell.shell("\n".join(back))
        configure(cell, {"storage-driver": "overlay2"})
        with started(cell, engine):
            assert cell.shell("docker cp kept:/mine - | tar -xO") == "mine\nmine\n"
            assert cell.shell("docker cp ours:/moved/sub/other - | tar -xO") == "other\n"
            cell.shell("docker start -a kept; docker rm kept ours; docker rmi busybox $1", TAG)
            assert cell.shell("ls -I backingFsBlockDev /var/lib/docker/overlay2") == "l\n"


def test_without_a_plugin() -> None:
    with machine() as cell:
        (link,) = commands("Without a plugin")
        cell.shell(f"cd {REPOSITORY}; {link}")
        configure(cell, documented_config("Without a plugin"))
        with started(cell, "dockerd &"):
            load(cell)
            assert cell.shell("docker info -f '{{.Driver}}'") == "fuse-overlayfs\n"
            said = cell.shell("docker run --rm --network none busybox mount | head -n 1")
            assert said.startswith("unionfs on / type fuse.unionfs-mount (rw,")
            cell.shell("docker rmi busybox $1", TAG)


def test_no_command_is_left_out() -> None:
    tried = {"Install", "Without systemd", "Faster mounts", "See that it is used", "Taking along what is there"}
    assert {name for name in SECTIONS if commands(name)} == tried | {"Without a plugin"}
