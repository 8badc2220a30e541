"""docs/podman.md, followed word for word; and its promise that an existing store may be handed over."""

from __future__ import annotations

import json
import re
from typing import Literal

import pytest

from tests.e2e.engines import awkward_image
from tests.e2e.engines.awkward_image import TAG
from tests.e2e.engines.podman import CONTAINERS_CONF, Podman, podman, storage_conf
from tests.e2e.engines.private import REPOSITORY, USER, USER_ID, private_cell
from tests.e2e.engines.scenario import Tree, census, without_times
from tests.support.sandbox import needs_root

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]
needs_root()

GUIDE = (REPOSITORY / "docs/podman.md").read_text()
SECTIONS = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", GUIDE, re.DOTALL | re.MULTILINE))
SHOWN = "unionfs on / type fuse.unionfs-mount (rw,"


def commands(section: str) -> str:
    """All commands of a section."""
    return "\n".join(re.findall(r"^```sh\n(.*?)^```", SECTIONS[section], re.DOTALL | re.MULTILINE))


def configuration(section: str) -> tuple[str, str]:
    """The path and the text of the configuration file in a section."""
    ((path, text),) = re.findall(r"^`(\S+)`:\n\n```toml\n(.*?)^```", SECTIONS[section], re.DOTALL | re.MULTILINE)
    return path, text


@pytest.mark.parametrize("user", ["root", USER])
def test_guide(user: str) -> None:
    section = "As root" if user == "root" else "As an ordinary user"
    who = None if user == "root" else user
    # The machine's own limits, not the storage's: see CONTAINERS_CONF.
    with private_cell(etc={"containers.conf": CONTAINERS_CONF}) as cell:
        # What is on the machine already: an image by that name, and a /usr/local/bin of this test's own.
        cell.shell("mount -t tmpfs bin /usr/local/bin")
        setup, link = commands("Install").splitlines()
        assert setup == "scripts/setup"  # has been run by whoever runs the tests
        cell.shell(f"cd {REPOSITORY}; {link}")
        path, text = configuration(section)
        cell.shell('file=${1/#~/$HOME}; mkdir -p "${file%/*}"; echo "$2" >"$file"', path, text, user=who)
        image = awkward_image.build(cell.root / "image", many_ids=False)
        cell.shell(f"podman load -q -i {image.archive}; podman tag {TAG} docker.io/library/busybox", user=who)
        said = cell.shell(commands(section), user=who)
        assert "/usr/local/bin/unionfs-mount" in said
        assert "unionfs-mount: version " in said
        assert said.splitlines()[-1].startswith(SHOWN)
        if who is not None:
            merged = cell.shell(commands("Buildah"), user=who).splitlines()[0]
            assert merged.endswith("/merged")
        root, rootless = commands("Faster mounts").split("\n\n")
        supervisor = (root if who is None else rootless).strip().removesuffix(" &").split()
        server = cell.start(*supervisor, log=cell.root / "tmp/supervisor", user=who)
        unshare = "" if who is None else "podman unshare "
        socket = "/run/unionfs/supervisor.sock" if who is None else f"/run/user/{USER_ID}/unionfs/supervisor-*.sock"
        cell.shell(f"for try in $(seq 300); do ls {socket} 2>/dev/null && break; sleep 0.1; done", user=who)
        cell.shell("podman run -d --name one docker.io/library/busybox sleep 1000", user=who)
        assert [
            mount["supervised"] for mount in json.loads(cell.shell(f"{unshare}unionfs mounts --json", user=who))
        ] == [True]
        cell.shell("podman rm -f -t 0 one", user=who)
        cell.run("kill", *(line.split()[0] for line in cell.processes() if "supervisor.daemon" in line))
        server.wait(60)
        cell.shell("podman rmi -a -f; podman system migrate", user=who)
        cell.shell("umount /usr/local/bin")
        cell.assert_quiet()


def test_the_guide_tells_all_commands() -> None:
    assert set(SECTIONS) >= {
        "Install",
        "As root",
        "As an ordinary user",
        "Buildah",
        "Faster mounts",
        "A store that exists already",
        "Limits",
    }
    assert sum(len(commands(section).splitlines()) for section in SECTIONS) == 11


def trees(engine: Podman) -> list[Tree]:
    """What the image, a container of it, and the image of that container show."""
    found = engine.run(TAG, "/bin/census"), engine.execute("one", "/bin/census"), engine.run("committed", "/bin/census")
    return [without_times(census(text)) for text in found]


@pytest.mark.parametrize("user", ["root", "rootless"])
def test_a_store_of_the_kernels_overlayfs_is_taken_over(user: Literal["root", "rootless"]) -> None:
    with podman("stock", user) as engine:
        engine.load(awkward_image.build(engine.cell.root / "image", many_ids=False).archive)
        engine.start(TAG, "one")
        engine.execute(
            "one", "sh", "-c", "rm -r d3; mkdir d3; echo 1 >d3/x; rm d4/old; echo 2 >>new/a; chmod 0 names; mv modes m"
        )
        engine.commit("one", "committed")
        before = trees(engine)
        engine("kill", "one")
        engine("wait", "one")
        home = engine.cell.root / ("home/.config/containers" if engine.user else "etc")
        run_root = f"/run/user/{USER_ID}/containers" if engine.user else f"{engine.cell.root}/run"
        (home / "storage.conf").write_text(storage_conf(engine.graph_root, run_root, "unionfs"))
        engine("start", "one")
        assert "fuse.unionfs-mount" in engine.execute("one", "mount").splitlines()[0]
        assert trees(engine) == before
