"""Changes on disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from unionfs.host import disk


@pytest.mark.parametrize("kind", ["file", "directory", "link", "absent"])
def test_whatever_has_the_name_is_deleted(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x"
    if kind == "file":
        path.write_text("1")
    elif kind == "directory":
        (path / "y").mkdir(parents=True)
    elif kind == "link":
        (tmp_path / "kept").mkdir()
        path.symlink_to("kept")
    disk.delete(str(path))
    assert [one.name for one in tmp_path.iterdir()] == (["kept"] if kind == "link" else [])
    disk.delete(str(path / "below"))
