"""Changes on disk."""

from __future__ import annotations

import os
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


def test_a_file_takes_its_name_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text("before")
    with disk.replacing(str(path), 0o640) as file:
        file.write(b"half")
        assert path.read_text() == "before"
        file.write(b" and half")
    assert (path.read_text(), path.stat().st_mode & 0o7777) == ("half and half", 0o640)
    assert os.listdir(tmp_path) == ["x"]


def test_what_fails_replaces_nothing(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text("before")
    with pytest.raises(ZeroDivisionError), disk.replacing(str(path)) as file:
        file.write(b"half")
        raise ZeroDivisionError
    assert path.read_text() == "before"
    assert os.listdir(tmp_path) == ["x"]


def test_a_new_file_has_the_mode_of_any_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    before = os.umask(0o027)
    try:
        with disk.replacing("new"):
            pass
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(before)
    assert (tmp_path / "new").stat().st_mode & 0o7777 == 0o640


def test_what_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught, disk.replacing(str(tmp_path / "none" / "x")):
        pass
    assert caught.value.filename == str(tmp_path / "none" / "x")
