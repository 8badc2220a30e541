"""docs/running.md, each command as it stands there."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

import pytest

from tests.e2e.engines.private import REPOSITORY, USER, Cell, private_cell
from tests.e2e.engines.terminal import terminal
from tests.e2e.engines.test_run import add_images, image_tar

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(os.geteuid() != 0 or not os.path.exists("/dev/fuse"), reason="needs root and /dev/fuse"),
]

GUIDE = REPOSITORY / "docs/running.md"
# Needs a network. The image is there already; tests/e2e/engines/test_pull.py pulls.
PULL = "unionfs image pull busybox"
AS_ROOT = ("At work", "In the background", "Limits", "Volumes", "Containers that stay")


def commands(heading: str | None) -> list[str]:
    """The lines of the shell blocks of one section; "" for what comes before the first, None for all of them."""
    text = GUIDE.read_text(encoding="utf-8")
    if heading is not None:
        titles = ["", *re.findall(r"^## (.*)$", text, re.M)]
        text = re.split(r"^## .*$", text, flags=re.M)[titles.index(heading)]
    return [line for block in re.findall(r"^```sh\n(.*?)^```", text, re.M | re.S) for line in block.splitlines()]


@pytest.fixture(scope="module")
def cell() -> Iterator[Cell]:
    """A machine with the image in root's store and in the user's own, at their default places."""
    with private_cell() as made:
        made.environment |= {"PYTHONPATH": f"{REPOSITORY}", "UNIONFS_RUNTIME": "runc"}
        (made.root / "store").mkdir()
        made.shell("mkdir -p /var/lib/unionfs && mount --bind $1 /var/lib/unionfs", made.root / "store")
        made.call(lambda: add_images("/var/lib/unionfs", image_tar()))
        yield made


def test_every_block_is_tried() -> None:
    tried = ("", *AS_ROOT, "As an ordinary user")
    assert sum(len(commands(heading)) for heading in tried) == len(commands(None))


def test_as_root(cell: Cell) -> None:
    first, *others = commands("")
    assert first == PULL
    for line in (*others, *(line for heading in AS_ROOT for line in commands(heading))):
        if "-it" in line.split():
            with terminal(cell._argv(["bash", "-c", line], None, None, None)) as screen:
                screen.wait_for("# ")
                screen.type("exit\r")
                assert screen.wait() == 0
            continue
        done = cell.run("bash", "-c", line)
        assert done.stderr == b"", line
        if "image history" in line:
            assert b"a file more" in done.stdout
        if "cat /" in line:
            assert done.stdout in (b"text\n", b"kept\n")
        if line.startswith("echo some text"):
            assert done.stdout == b"some text\n"
        if "container diff" in line:
            assert done.stdout == b"A /file\n"
    assert cell.processes() == []


def test_as_an_ordinary_user(cell: Cell) -> None:
    pull, run = commands("As an ordinary user")
    # The same as the guide's pull, but for where the image comes from.
    assert pull == PULL
    archive = cell.root / "tmp/busybox.tar"
    cell.run("unionfs", "image", "export", "busybox", "--output", archive)
    cell.run("bash", "-c", pull.replace("pull busybox", f"import {archive}"), user=USER)
    assert cell.run("bash", "-c", run, user=USER).stdout.startswith(b"uid=0(root)")
