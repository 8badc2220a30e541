"""Small layers for the driver tests."""

from __future__ import annotations

import os
from pathlib import Path

from tests.drivers.rig import Rig


def write(root: str, name: str, content: bytes) -> str:
    path = os.path.join(root, name)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    Path(path).write_bytes(content)
    return path


def make_base(rig: Rig, layer_id: str = "base") -> None:
    rig.driver.create(layer_id)
    with rig.got(layer_id) as root:
        write(root, "etc/passwd", b"root")
        write(root, "etc/group", b"wheel")
        write(root, "bin/sh", b"#!")
        os.symlink("bin/sh", root + "/sh")
        os.link(root + "/bin/sh", root + "/bin/bash")


def lines(rig: Rig, layer_id: str, parent: str) -> list[str]:
    return [str(change) for change in rig.driver.changes(layer_id, parent)]


def tree_names(root: str) -> list[str]:
    """The paths of everything below ``root``."""
    return sorted(os.path.join(at, name) for at, dirs, files in os.walk(root) for name in dirs + files)
