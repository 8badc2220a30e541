"""Apptainer with our program in the place of fuse-overlayfs, which it runs by name; compared with fuse-overlayfs.

It runs the program as an ordinary user with CAP_SYS_ADMIN in a user namespace, in the foreground (``-f``), on a
``/dev/fuse`` that it has mounted itself (``/dev/fd/N``), and shows the user whatever it says.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator

import pytest

from tests.e2e.engines.private import REPOSITORY, USER, Cell, private_cell
from tests.support.sandbox import needs_root

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(
        shutil.which("apptainer") is None,
        reason="this Debian has no package of Apptainer; tests/e2e/systems runs this in one that has",
    ),
]
needs_root()

_ROOT = """
mkdir -p $1; cd $1
mkdir -p bin usr/bin etc proc sys dev tmp var/tmp root home d/sub gone made-again
cp "$(command -v busybox)" bin/busybox
for applet in sh cat chmod echo find ln ls mkdir mount mv rm sort stat touch; do ln -s busybox bin/$applet; done
printf 'root:x:0:0::/root:/bin/sh\\n' >etc/passwd
printf 'root:x:0:\\n' >etc/group
touch etc/resolv.conf etc/hosts etc/localtime
echo 1 >d/old; echo 2 >d/sub/deep; echo 3 >gone/file; echo 4 >made-again/old; ln d/old d/link
"""
_CHANGE = """
cd /
echo more >>d/sub/deep; chmod 600 d/sub/deep; echo new >d/new; ln -s /nowhere d/symlink; rm d/old
rm -r gone made-again; mkdir made-again; echo 5 >made-again/new; mv d/sub d/moved
"""
_LOOK = """
cd /
find d gone made-again 2>/dev/null | sort | while read -r path; do
    stat -c '%n %F %a %u:%g' "$path"; [ ! -f "$path" ] || cat "$path"
done
"""
WAYS = {
    "--overlay": ("--overlay", "changes"),
    "--overlay --fakeroot": ("--fakeroot", "--overlay", "changes"),
    "--writable-tmpfs": ("--writable-tmpfs",),
}


@pytest.fixture(scope="module")
def cell() -> Iterator[Cell]:
    """A private root with a small root file system of the user's, and an image of it."""
    with private_cell() as made:
        made.shell(f"cd; {_ROOT}", "root", user=USER)
        made.shell("cd; printf 'Bootstrap: localimage\\nFrom: root\\n' >def; apptainer build image.sif def", user=USER)
        # The first of that name in PATH is what it takes.
        made.shell(
            f"mkdir $1/tmp/ours; ln -s {REPOSITORY}/.venv/bin/unionfs-mount $1/tmp/ours/fuse-overlayfs", made.root
        )
        yield made
        made.assert_quiet()


def execute(cell: Cell, options: tuple[str, ...], path: str, script: str) -> subprocess.CompletedProcess[bytes]:
    """Run a script in a container, as the user in his home."""
    argv = ("bash", "-euc", 'cd; exec apptainer exec "$@"', "bash", *options, "image.sif", "/bin/sh", "-euc", script)
    return cell.run(*argv, user=USER, env={"PATH": path})


def story(cell: Cell, options: tuple[str, ...], path: str) -> tuple[str, str]:
    """Change a container and look at it, then look at it in another one; what it showed, and what Apptainer said."""
    cell.shell("cd; rm -rf changes; mkdir changes", user=USER)
    shown = said = ""
    for script in (_CHANGE + _LOOK, _LOOK):
        done = execute(cell, options, path, script)
        shown += done.stdout.decode() + "--\n"
        said += done.stderr.decode()
    return shown, said


@pytest.mark.parametrize("way", WAYS)
def test_as_fuse_overlayfs(cell: Cell, way: str) -> None:
    """With an image, which squashfuse mounts; over a directory Apptainer takes the kernel's overlayfs where it can."""
    usual = cell.environment["PATH"]
    ours_first = f"{cell.root}/tmp/ours:{usual}"
    mounts = "while read -r line; do case $line in *' / '*) echo $line; esac; done </proc/self/mounts"
    cell.shell("cd; mkdir -p changes", user=USER)
    done = execute(cell, WAYS[way], ours_first, mounts)
    assert b" fuse.unionfs-mount " in done.stdout
    ours, said = story(cell, WAYS[way], ours_first)
    stock, stock_said = story(cell, WAYS[way], usual)
    assert ours.splitlines() == stock.splitlines()
    assert said.splitlines() == stock_said.splitlines()
    assert "d/moved/deep regular file 600" in ours
