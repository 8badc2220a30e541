"""Who a container's process is, and files in containers that mean us harm."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from unionfs.engines.run.process import User, resolve_user
from unionfs.engines.run.rootfs import RootFs
from unionfs.errors import RunError

PASSWD = """\
root:x:0:0::/root:/bin/sh
# a comment
broken:x:y:z::/:/bin/sh
short:x:5
app:x:1234:2345::/home/app:/bin/sh
1000:x:50:60::/odd:/bin/sh
twice:x:1234:9::/second:/bin/sh
homeless:x:70:71:::
"""
GROUP = "root:x:0:\napps:x:2345:\nmedia:x:3456:app,root\nmedia2:x:3456:app\nother:x:4567:root\nbad:x:q:app\nlast:x:9"


@pytest.fixture
def rootfs(tmp_path: Path) -> Iterator[RootFs]:
    (tmp_path / "root/etc").mkdir(parents=True)
    (tmp_path / "root/etc/passwd").write_text(PASSWD)
    (tmp_path / "root/etc/group").write_text(GROUP)
    with RootFs(str(tmp_path / "root")) as opened:
        yield opened


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", User(0, 0, (0, 3456, 4567), "/root")),
        ("root", User(0, 0, (0, 3456, 4567), "/root")),
        ("app", User(1234, 2345, (2345, 3456), "/home/app")),
        ("1234", User(1234, 2345, (2345, 3456), "/home/app")),
        ("app:", User(1234, 2345, (2345, 3456), "/home/app")),
        ("app:other", User(1234, 4567, (4567,), "/home/app")),
        ("app:last", User(1234, 9, (9,), "/home/app")),
        ("77", User(77, 0, (0,), "/")),
        ("77:88", User(77, 88, (88,), "/")),
        ("77:apps", User(77, 2345, (2345,), "/")),
        (":88", User(0, 88, (88,), "/root")),
        ("1000", User(50, 60, (60,), "/odd")),
        ("homeless", User(70, 71, (71,), "/")),
        ("2147483647", User(2**31 - 1, 0, (0,), "/")),
    ],
)
def test_users(rootfs: RootFs, text: str, expected: User) -> None:
    assert resolve_user(rootfs, text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "nobody",
        "app:nobody",
        "-1",
        "2147483648",
        "1 2",
        "\N{ARABIC-INDIC DIGIT ONE}",
        "broken",
        "short",
        "# a comment",
        "0x10",
    ],
)
def test_what_the_container_does_not_have(rootfs: RootFs, text: str) -> None:
    with pytest.raises(RunError, match="does not have it; give a number"):
        resolve_user(rootfs, text)


def test_numbers_need_no_files(tmp_path: Path) -> None:
    with RootFs(str(tmp_path)) as empty:
        assert resolve_user(empty, "") == User(0, 0, (0,), "/")
        assert resolve_user(empty, "5:6") == User(5, 6, (6,), "/")
        with pytest.raises(RunError):
            resolve_user(empty, "root")


@pytest.mark.parametrize("target", ["/etc/passwd", "../../../../../../etc/passwd", "/proc/self/root/etc/passwd"])
def test_a_link_does_not_lead_out(tmp_path: Path, target: str) -> None:
    inside = tmp_path / "root"
    (inside / "elsewhere").mkdir(parents=True)
    (inside / "etc").mkdir()
    (inside / "etc/passwd").symlink_to(target)
    with RootFs(str(inside)) as rootfs, pytest.raises(RunError):
        resolve_user(rootfs, "root")  # the host has one


def test_a_link_within_is_followed_from_the_containers_root(tmp_path: Path) -> None:
    (tmp_path / "usr/etc").mkdir(parents=True)
    (tmp_path / "usr/etc/passwd").write_text("web:x:33:33::/www:/bin/sh\n")
    (tmp_path / "etc").symlink_to("/usr/etc")
    with RootFs(str(tmp_path)) as rootfs:
        assert resolve_user(rootfs, "web") == User(33, 33, (33,), "/www")


def test_a_fifo_is_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    os.mkfifo(tmp_path / "etc/passwd")
    with RootFs(str(tmp_path)) as rootfs:
        assert resolve_user(rootfs, "5") == User(5, 0, (0,), "/")


def test_mount_points_are_made_inside(tmp_path: Path) -> None:
    inside, outside = tmp_path / "root", tmp_path / "outside"
    inside.mkdir()
    outside.mkdir()
    (inside / "link").symlink_to(outside)
    (inside / "up").symlink_to("../../../../../../../..")
    with RootFs(str(inside)) as rootfs:
        rootfs.make_dir("/a/b/c")
        rootfs.make_dir("/up/d")
        rootfs.make_dir("/a/b")
        rootfs.make_file("/x/y/file")
        rootfs.make_file("/x/y/file")
        with pytest.raises(FileExistsError):
            rootfs.make_dir("/link/e")  # leads nowhere in the container
        with pytest.raises(NotADirectoryError):
            rootfs.make_dir("/x/y/file/z")
    assert (inside / "a/b/c").is_dir()
    assert (inside / "d").is_dir()
    assert (inside / "x/y/file").read_bytes() == b""
    assert list(outside.iterdir()) == []
