"""Programs that run others in a directory: in a mount of ours they do what they do in a plain directory."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e.engines.private import USER, Cell, private_cell
from tests.support.sandbox import needs_root

pytestmark = [pytest.mark.engine]
needs_root()

_LOWER = r"""
cd; mkdir -p lower; cd lower
mkdir -p bin usr/bin etc proc sys dev tmp run var root home mnt d/sub gone made-again
cp "$(command -v busybox)" bin/busybox
for applet in sh cat chmod echo find ls mkdir mv rm sort stat touch; do ln -s busybox bin/$applet; done
printf 'root:x:0:0::/root:/bin/sh\n' >etc/passwd
printf 'root:x:0:\n' >etc/group
printf 'ID=small\n' >etc/os-release
touch etc/resolv.conf etc/hosts etc/hostname etc/localtime etc/machine-id
echo 1 >d/old; echo 2 >d/sub/deep; echo 3 >gone/file; echo 4 >made-again/old
cd ..; cp -a lower plain; mkdir upper merged
# What runs in it finds this as /change.
cat >change
"""
_CHANGE = b"""
set -e; cd /
echo more >>d/sub/deep; chmod 600 d/sub/deep; echo new >d/new; ln -s /nowhere d/symlink; rm d/old
rm -r gone made-again; mkdir made-again; echo 5 >made-again/new; mv d/sub d/moved
cat d/moved/deep
for path in d d/* made-again/*; do stat -c '%n %F %a %u:%g' $path; done
"""
_TREE = r"find . -path ./dev -prune -o -printf '%P %y %m %U:%G %l\n' | sort; cat d/moved/deep made-again/new"
# A control group hierarchy as it is on today's machines, for one that does without those of before.
_UNIFIED = "[ -e /sys/fs/cgroup/cgroup.controllers ] || mount -t cgroup2 cgroup2 /sys/fs/cgroup"
PROGRAMS = {
    "bubblewrap": (USER, "bwrap --bind {0} / --dev /dev --proc /proc --unshare-all --die-with-parent /bin/sh -c"),
    "charliecloud": (USER, "ch-run --write ./{0} -- /bin/sh -c"),
    "nspawn": (
        None,
        f"unshare --mount sh -euc '{_UNIFIED}; exec \"$@\"' sh "
        "systemd-nspawn --quiet --register=no --keep-unit --directory={0} /bin/sh -c",
    ),
}


@pytest.fixture
def cell() -> Iterator[Cell]:
    with private_cell() as made:
        yield made
        made.assert_quiet()


@pytest.mark.parametrize("program", PROGRAMS)
def test_as_in_a_directory(cell: Cell, program: str) -> None:
    user, command = PROGRAMS[program]
    cell.run("bash", "-euc", _LOWER, stdin=_CHANGE, user=user)
    cell.shell("cd; cp -a lower before; unionfs mount --lower lower --upper upper merged", user=user)
    shown = []
    for directory in ("plain", "merged"):
        said = cell.shell(f'cd; {command.format(directory)} "$(cat change)"', user=user)
        shown.append(said + cell.shell(f"cd; cd {directory}; {_TREE}", user=user))
    cell.shell("cd; unionfs umount merged; diff -r lower before", user=user)
    plain, merged = shown
    assert merged.splitlines() == plain.splitlines()
    assert "d/moved/deep f 600 " in merged
