"""The layer store of an ordinary user, as root of a user namespace."""

from __future__ import annotations

import tarfile

import pytest

from tests.e2e.engines.private import USER, private_cell
from tests.layers.archives import archive, member

pytestmark = [pytest.mark.engine, pytest.mark.timeout(120)]

NAMESPACE = "unshare --map-root-user --map-auto --mount --propagation private"
# The default root is in the user's home, and the same store is found again by the next namespace.
SCRIPT = """
set -eu
unionfs layer register layer.tar
unionfs container create --name c $(unionfs layer ls --json | grep chain_id | cut -d'"' -f4)
path=$(unionfs container mount c)
stat -c %u:%a $path/mine $path/other
echo new > $path/other/new
unionfs container diff c
unionfs container umount c
unionfs fsck --deep
"""


def test_in_a_user_namespace() -> None:
    tar = archive([member("mine", "1", mode=0o4755), member("other/"), member("null", kind=tarfile.CHRTYPE)])
    with private_cell() as cell:
        home = cell.root / "home"
        (home / "layer.tar").write_bytes(tar)
        plain = cell.run("unionfs", "layer", "register", "layer.tar", user=USER, cwd=home, check=False)
        assert plain.returncode == 1
        assert b"run as root, also of a user namespace (unshare --map-root-user" in plain.stderr
        assert plain.stderr.count(b"\n") == 1
        done = cell.run(*NAMESPACE.split(), "sh", "-c", SCRIPT, user=USER, cwd=home)
        lines = done.stdout.decode().splitlines()
        assert lines[1:] == [
            "c",
            "0:4755",
            "0:755",
            "C /other",
            "A /other/new",
            "1 layer, 1 container, 0 problems, 0 left.",
        ]
        again = cell.run(*NAMESPACE.split(), "unionfs", "container", "ls", user=USER, cwd=home)
        assert again.stdout.decode().splitlines()[1].split() == ["c", lines[0][7:19], "-"]
        assert (home / ".local/share/unionfs/image").is_dir()
        cell.wait_until_quiet()
        # What other ids own, only a namespace with them removes.
        cell.run(*NAMESPACE.split(), "rm", "-r", ".local", user=USER, cwd=home)
