"""docs/unionfs.md, each command as it stands there and in this order."""

from __future__ import annotations

import os
import re

import pytest

from tests.e2e.engines.private import REPOSITORY, private_cell

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(os.geteuid() != 0 or not os.path.exists("/dev/fuse"), reason="needs root and /dev/fuse"),
]

GUIDE = REPOSITORY / "docs/unionfs.md"


def test_the_guide() -> None:
    text = GUIDE.read_text(encoding="utf-8")
    commands = "".join(re.findall(r"^```sh\n(.*?)^```", text, re.M | re.S))
    assert commands.count("unionfs ") > 6
    with private_cell() as cell:
        environment = {"UNIONFS_ROOT": f"{cell.root}/store", "PYTHONPATH": f"{REPOSITORY}"}
        done = cell.run("bash", "-euc", commands, cwd=cell.root / "home", env=environment)
        said = done.stdout.decode()
        assert done.stderr == b""
        assert re.search(rf"^/mnt +{cell.root}/home/app +{cell.root}/home/changes +[0-9]+ +serving$", said, re.M)
        assert f"{cell.root}/home/changes.work" in said
        assert re.search(r"^transport +(direct|pyfuse3) ", said, re.M)
        assert said.endswith("together 0 B.\n")
        cell.assert_quiet()


def test_every_command_of_the_tree_has_its_place() -> None:
    """The table names what there is, and nothing else."""
    from unionfs.cli.main import unionfs

    text = GUIDE.read_text(encoding="utf-8")
    table = "".join(line for line in text.splitlines() if line.startswith("| `unionfs "))
    named = {word for quoted in re.findall(r"`(?:unionfs )?([a-z]+)(?: [a-z-]+)?`", table) for word in [quoted]}
    assert named | {"mount", "umount", "mounts"} == set(unionfs.commands)
