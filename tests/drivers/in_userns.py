"""What ``test_rootless.py`` runs in a user namespace of its own: ``in_userns.py DRIVER DIRECTORY``."""

from __future__ import annotations

import errno
import io
import os
import shutil
import sys
from pathlib import Path

from tests.drivers.rig import INITS
from unionfs.archive.idmapping import IdMapping
from unionfs.drivers.contract import CreateOptions
from unionfs.testing.rig import got
from unionfs.testing.trees import write

EXPECTED = ["D /a", "C /d", "D /d/f", "A /d/g", "A /new"]


def main(kind: str, home: str) -> None:
    """A layer's life: made, written through its mount, exported, applied, removed."""
    driver = INITS[kind](home, [], IdMapping())
    driver.create("base")
    with got(driver, "base") as root:
        write(root, "a", b"1")
        write(root, "d/f", b"1")
    driver.create_read_write("x", "base")
    with got(driver, "x") as root:
        os.unlink(root + "/a")
        shutil.rmtree(root + "/d")
        write(root, "d/g", b"2")
        write(root, "new", b"3")
        assert [str(change) for change in driver.changes("x", "base")] == EXPECTED
    with driver.diff("x", "base") as stream:
        archive = stream.read()
    driver.create("copy", "base")
    driver.apply_diff("copy", "base", io.BytesIO(archive))
    assert [str(change) for change in driver.changes("copy", "base")] == EXPECTED
    with got(driver, "copy") as root:
        assert sorted(os.listdir(root)) == ["d", "new"]
        assert Path(root, "d/g").read_bytes() == b"2"
    if kind == "unionfs":  # no quota of the disk's can be set from here
        driver.create_read_write("small", "base", CreateOptions(storage_options={"size": "1M"}))
        with got(driver, "small") as root:
            st = os.statvfs(root)
            assert st.f_blocks * st.f_frsize == 1 << 20
            try:
                write(root, "big", bytes(2 << 20))
            except OSError as error:
                assert error.errno == errno.ENOSPC
            assert os.path.getsize(root + "/big") < 1 << 20
        driver.remove("small")
    for layer in ("x", "copy", "base"):
        driver.remove(layer)
    driver.cleanup()
    print("done", dict(driver.status()).get("userxattr", ""))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
