"""The home is overlay2's to the byte, heals itself, and either layered driver opens the other's."""

from __future__ import annotations

import os
import re
import stat
import subprocess
from pathlib import Path

import pytest

from tests.drivers.rig import INITS, LAYERED, Rig, make_rig
from tests.support.mounts import servers_of, wait_until
from unionfs.archive.idmapping import IdMapping
from unionfs.drivers import layered, overlay2, union
from unionfs.drivers.layered import Stack
from unionfs.drivers.overlay2 import KernelMounter
from unionfs.drivers.overlay_home import OverlayHome, new_link_name
from unionfs.drivers.union import FuseMounter
from unionfs.errors import (
    DriverError,
    IncompatibleFilesystemError,
    LayerBusyError,
    MountError,
    OptionError,
    PrerequisitesError,
)
from unionfs.overlay.idmap import IdRange
from unionfs.testing.rig import got
from unionfs.testing.trees import write


def mode(path: str) -> int:
    return stat.S_IMODE(os.lstat(path).st_mode)


def read(path: str) -> str:
    return Path(path).read_text(encoding="ascii")


def test_layout(layered_rig: Rig) -> None:
    os.umask(0o077)
    driver = layered_rig.driver
    driver.create("base")
    driver.create("middle", "base")
    driver.create_read_write("top", "middle")
    os.umask(0o022)
    home = os.path.realpath(layered_rig.home)
    assert sorted(os.listdir(home)) == ["base", "l", "middle", "top"]
    assert (mode(home), mode(home + "/l")) == (0o710, 0o700)
    assert sorted(os.listdir(home + "/base")) == ["committed", "diff", "link"]
    assert sorted(os.listdir(home + "/middle")) == ["committed", "diff", "link", "lower", "work"]
    assert sorted(os.listdir(home + "/top")) == ["diff", "link", "lower", "work"]
    for layer in ("base", "middle", "top"):
        assert mode(f"{home}/{layer}") == 0o710
        assert mode(f"{home}/{layer}/diff") == 0o755
        assert mode(f"{home}/{layer}/link") == 0o644
        assert re.fullmatch("[A-Z2-7]{26}", read(f"{home}/{layer}/link"))
        assert os.readlink(f"{home}/l/{read(f'{home}/{layer}/link')}") == f"../{layer}/diff"
    assert len(os.listdir(home + "/l")) == 3
    base, middle = read(home + "/base/link"), read(home + "/middle/link")
    assert read(home + "/middle/lower") == f"l/{base}"
    assert read(home + "/top/lower") == f"l/{middle}:l/{base}"
    assert (mode(home + "/top/lower"), mode(home + "/top/work")) == (0o644, 0o700)
    assert (mode(home + "/base/committed"), os.path.getsize(home + "/base/committed")) == (0o600, 0)
    with got(driver, "top") as root:
        assert root == home + "/top/merged"
        assert os.path.isdir(home + "/top/work/work")
    assert not os.path.exists(home + "/top/merged")


def test_remapped_root_owns_the_directories(layered_rig: Rig) -> None:
    driver = layered_rig.open(id_mapping=IdMapping([IdRange(0, 1000, 10)], [IdRange(0, 2000, 10)]))
    driver.create("base")
    driver.create_read_write("x", "base")
    home = os.path.realpath(layered_rig.home)

    def owner(path: str) -> tuple[int, int]:
        info = os.stat(f"{home}/{path}")
        return info.st_uid, info.st_gid

    assert (owner("."), owner("x")) == ((0, 2000), (0, 2000))
    with got(driver, "x") as root:
        assert owner("x/work/work") == (1000, 2000)
        assert (os.stat(root).st_uid, os.stat(root).st_gid) == (1000, 2000)
    assert {owner(path) for path in ("l", "base/diff", "x/diff", "x/work")} == {(1000, 2000)}


def test_link_names_do_not_repeat() -> None:
    assert len({new_link_name() for _ in range(1000)}) == 1000


def test_depth_limit(layered_rig: Rig) -> None:
    driver = layered_rig.driver
    driver.create("layer0")
    for number in range(1, 129):
        driver.create(f"layer{number}", f"layer{number - 1}")
    with pytest.raises(DriverError, match="max depth exceeded: layer128 has 128 parents"):
        driver.create("layer129", "layer128")
    assert not driver.exists("layer129")
    write(driver.get_metadata("layer0")["UpperDir"], "bottom", b"1")
    with got(driver, "layer128") as root:
        assert os.listdir(root) == ["bottom"]
        write(root, "top", b"")
    assert layered_rig.lines("layer128", "layer127") == ["A /top"]


def test_depth_limit_of_the_union_is_an_option(tmp_path: Path) -> None:
    driver = union.init(str(tmp_path / "h"), ["unionfs.max_depth=2"], IdMapping())
    for name, parent in (("a", ""), ("b", "a"), ("c", "b")):
        driver.create(name, parent)
    with pytest.raises(DriverError, match="the most is 2"):
        driver.create("d", "c")
    for bad in ("0", "x", "-1"):
        with pytest.raises(OptionError, match="max_depth"):
            union.init(str(tmp_path / "h"), [f"unionfs.max_depth={bad}"], IdMapping())
    with pytest.raises(OptionError, match="redirect_dir"):
        union.init(str(tmp_path / "h"), ["unionfs.redirect_dir=maybe"], IdMapping())


@pytest.mark.parametrize(("writer", "reader"), [("unionfs", "overlay2"), ("overlay2", "unionfs")])
def test_each_opens_the_others_home(writer: str, reader: str, tmp_path: Path) -> None:
    with make_rig(writer, str(tmp_path)) as rig:
        rig.make_base()
        rig.driver.create("middle", "base")
        with rig.got("middle") as root:
            os.unlink(root + "/sh")
            write(root, "etc/passwd", b"changed")
            if writer == "unionfs":
                os.rename(root + "/bin", root + "/programs")
        rig.driver.create_read_write("top", "middle")
        with rig.got("top") as root:
            write(root, "new", b"1")
        listed = {pair: rig.lines(*pair) for pair in (("base", ""), ("middle", "base"), ("top", "middle"), ("top", ""))}
        with rig.driver.diff("middle", "base") as stream:
            archive = stream.read()
        rig.driver.cleanup()

        other = INITS[reader](rig.home, [], IdMapping())
        for pair, expected in listed.items():
            assert [str(change) for change in other.changes(*pair)] == expected
        with other.diff("middle", "base") as stream:
            assert stream.read() == archive
        with got(other, "top") as root:
            assert Path(root, "etc/passwd").read_bytes() == b"changed"
            assert os.path.exists(root + ("/programs/sh" if writer == "unionfs" else "/bin/sh"))
            write(root, "newer", b"2")
        other.create("over", "top")
        other.cleanup()
        assert rig.lines("top", "middle") == ["A /new", "A /newer"]
        with rig.got("over") as root:
            assert Path(root, "newer").read_bytes() == b"2"


@pytest.mark.parametrize(("first", "second"), [("unionfs", "overlay2"), ("overlay2", "unionfs")])
def test_live_mount_of_the_other_driver_is_taken_over(first: str, second: str, tmp_path: Path) -> None:
    with make_rig(first, str(tmp_path)) as rig:
        rig.make_base()
        rig.driver.create_read_write("x", "base")
        path = rig.driver.get("x")
        servers = servers_of(path)
        other = INITS[second](rig.home, [], IdMapping())
        assert other.get("x") == path
        other.put("x")
        other.put("x")
        assert rig.mounts() == []
        assert wait_until(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in servers), 10)


def test_dead_server_is_replaced(tmp_path: Path) -> None:
    with make_rig("unionfs", str(tmp_path)) as rig:
        rig.make_base()
        for name in ("x", "y"):
            rig.driver.create_read_write(name, "base")
            path = rig.driver.get(name)
            write(path, "kept", b"1")
            (server,) = servers_of(path)
            os.kill(server, 9)
            assert wait_until(lambda server=server: not os.path.exists(f"/proc/{server}"), 10)  # type: ignore[misc]
        # After a restart the dead mounts are gone, and a get mounts anew.
        rig.restart()
        assert rig.mounts() == []
        assert rig.driver.get("x") == path.replace("/y/", "/x/")
        assert os.path.exists(path.replace("/y/", "/x/") + "/kept")
        rig.driver.put("x")


def test_server_that_died_under_the_driver(tmp_path: Path) -> None:
    with make_rig("unionfs", str(tmp_path)) as rig:
        rig.make_base()
        rig.driver.create_read_write("x", "base")
        path = rig.driver.get("x")
        (server,) = servers_of(path)
        os.kill(server, 9)
        assert wait_until(lambda: not os.path.exists(f"/proc/{server}"), 10)
        rig.driver.put("x")
        assert rig.mounts() == []
        with rig.got("x") as root:
            assert sorted(os.listdir(root)) == ["bin", "etc", "sh"]
        rig.driver.get("x")
        (server,) = servers_of(path)
        os.kill(server, 9)
        assert wait_until(lambda: not os.path.exists(f"/proc/{server}"), 10)
        rig.driver.remove("x")
        assert rig.mounts() == []


def test_lost_and_wrong_links_are_put_right(layered_rig: Rig) -> None:
    layered_rig.make_base()
    layered_rig.driver.create("middle", "base")
    layered_rig.driver.create_read_write("top", "middle")
    links = os.path.realpath(layered_rig.home) + "/l"
    expected = {name: os.readlink(f"{links}/{name}") for name in os.listdir(links)}
    lost, wrong = (read(os.path.realpath(layered_rig.home) + f"/{layer}/link") for layer in ("base", "middle"))
    os.unlink(f"{links}/{lost}")
    os.unlink(f"{links}/{wrong}")
    os.symlink("../elsewhere/diff", f"{links}/{wrong}")
    os.symlink("../gone/diff", f"{links}/AAAAAAAAAAAAAAAAAAAAAAAAAA")
    with pytest.raises(DriverError, match="open the driver again"):
        layered_rig.driver.get_metadata("top")
    layered_rig.restart()
    assert {name: os.readlink(f"{links}/{name}") for name in os.listdir(links)} == expected
    with layered_rig.got("top") as root:
        assert os.path.exists(root + "/etc/passwd")


@pytest.mark.parametrize("name", ["link", "lower"])
@pytest.mark.parametrize("content", ["", "../../../etc", "l/../../etc", "l/AAA:"])
def test_damaged_files_are_named(layered_rig: Rig, name: str, content: str) -> None:
    driver = layered_rig.driver
    driver.create("base")
    driver.create("x", "base")
    path = os.path.realpath(layered_rig.home) + f"/x/{name}"
    Path(path).write_text(content)
    with pytest.raises(DriverError, match=re.escape(path) + ".*remove"):
        driver.create("y", "x")
    assert sorted(driver.layer_ids()) == ["base", "x"]  # type: ignore[attr-defined]
    layered_rig.restart().remove("x")
    assert layered_rig.driver.layer_ids() == ["base"]  # type: ignore[attr-defined]
    assert len(os.listdir(os.path.realpath(layered_rig.home) + "/l")) == (1 if name == "lower" else 2)
    layered_rig.restart()
    assert len(os.listdir(os.path.realpath(layered_rig.home) + "/l")) == 1


@pytest.mark.parametrize("lost", ["committed", "link", "l"])
def test_a_parent_stays_one_without_its_marks(layered_rig: Rig, lost: str) -> None:
    """What says that a layer has children may be damaged, or older than the mark: the children's own files count."""
    driver = layered_rig.driver
    layered_rig.make_base()
    driver.create_read_write("x", "base")
    home = os.path.realpath(layered_rig.home)
    path = f"{home}/l/{read(f'{home}/base/link')}" if lost == "l" else f"{home}/base/{lost}"
    os.unlink(path)
    if lost == "link":
        os.symlink("nowhere", path)
    with pytest.raises(LayerBusyError, match="it is the parent of x"):
        driver.remove("base")
    with pytest.raises(LayerBusyError, match="it is the parent of x"):
        layered_rig.restart().remove("base")


def test_options_longer_than_a_page_are_relative(tmp_path: Path) -> None:
    home = OverlayHome(str(tmp_path / ("long" * 20) / ("name" * 20)), IdMapping())
    home.create("layer0", "", lambda _: None)
    for number in range(1, 120):
        home.create(f"layer{number}", f"layer{number - 1}", lambda _: None)
    paths = home.paths("layer119")
    Path(home.paths("layer0").diff, "bottom").touch()
    os.mkdir(paths.merged)
    stack = Stack(
        home=home.root,
        target=paths.merged,
        lowers=tuple(home.lower_dirs("layer119")),
        upper=paths.diff,
        work=paths.work,
    )
    assert len(",".join(stack.lowers)) > 4096
    here = os.getcwd()
    mounter = KernelMounter()
    mounter.mount(stack)
    try:
        assert os.listdir(paths.merged) == ["bottom"]
        assert os.getcwd() == here
    finally:
        mounter.take_down(paths.merged, lazy=False)


def test_mount_label_is_passed_where_the_host_has_selinux(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    label = "system_u:object_r:container_file_t:s0:c1,c2"
    asked: list[str] = []

    def mount(target: str, options: str, directory: str | None = None) -> None:
        asked.append(options)
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(overlay2, "mount_overlay", mount)
    monkeypatch.setattr("unionfs.host.selinux.selinux_enabled", lambda: True)
    stack = Stack(home="/h", target="/h/x/merged", lowers=("/a", "/b"), mount_label=label)
    with pytest.raises(MountError, match="/h/x/merged: Invalid argument"):
        KernelMounter().mount(stack)
    assert asked[0].endswith(f'lowerdir=/a:/b,context="{label}"')
    with pytest.raises(MountError, match=r"a shorter mount label \(5000 bytes\)"):
        KernelMounter().mount(Stack(home="/h", target="/h/x", lowers=("/a", "/b"), mount_label="x" * 5000))

    commands: list[list[str]] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[bytes]:
        commands.append(command)
        return subprocess.CompletedProcess(command, 1, b"", b"unionfs-mount: no\n")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(MountError, match=r"^no$"):
        FuseMounter(("volatile",)).mount(stack)
    assert commands[0][-2:] == [f'lowerdir=/a:/b,context="{label}",volatile', "/h/x/merged"]


def test_names_with_separators_in_the_path(tmp_path: Path) -> None:
    for kind in LAYERED:
        driver = INITS[kind](str(tmp_path / f"a:b,c\\d{kind}"), [], IdMapping())
        driver.create("base")
        driver.create_read_write("x:y,z", "base")
        with got(driver, "x:y,z") as root:
            write(root, "f", b"1")
        assert [str(change) for change in driver.changes("x:y,z", "base")] == ["A /f"]


def test_union_needs_a_fuse_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_device(path: str, *_: object) -> int:
        raise FileNotFoundError(2, "No such file or directory", path)

    monkeypatch.setattr(os, "open", no_device)
    with pytest.raises(PrerequisitesError, match="modprobe fuse"):
        union.init(str(tmp_path / "h"), [], IdMapping())


def test_file_system_that_cannot_hold_layers(tmp_path: Path) -> None:
    where = tmp_path / "proc"
    where.mkdir()
    subprocess.run(["mount", "-t", "ramfs", "-o", "ro", "none", where], check=True)
    try:
        with pytest.raises((DriverError, OSError)):
            union.init(str(where / "h"), [], IdMapping())
    finally:
        subprocess.run(["umount", where], check=True)
    # overlayfs does not take itself as an upper.
    with make_rig("overlay2", str(tmp_path)) as rig:
        rig.driver.create("base")
        rig.driver.create_read_write("x", "base")
        with rig.got("x") as root:
            with pytest.raises(IncompatibleFilesystemError, match="overlayfs"):
                INITS["overlay2"](root + "/inner", [], IdMapping())
            assert os.listdir(root + "/inner") == ["l"]


def test_kernel_facts(tmp_path: Path) -> None:
    facts = overlay2.probe(str(tmp_path))
    assert facts.supports_d_type
    assert facts.native_diff
    assert not facts.userxattr
    assert os.listdir(tmp_path) == []


def test_naive_difference_where_the_kernel_is_not_exact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = overlay2.probe
    monkeypatch.setattr("unionfs.drivers.overlay2.probe", lambda path: real(path)._replace(native_diff=False))
    with make_rig("overlay2", str(tmp_path)) as rig:
        rig.make_base()
        rig.driver.create_read_write("x", "base")
        with rig.got("x") as root:
            write(root, "etc/passwd", b"longer")
        monkeypatch.setattr(layered, "changes_of_upper", None)
        assert rig.lines("x", "base") == ["C /etc", "C /etc/passwd"]
        assert ("Native Overlay Diff", "false") in rig.driver.status()
        rig.driver.diff("x", "base").close()
        assert rig.mounts() == []


def test_half_made_layer_leaves_nothing(layered_rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    layered_rig.make_base()
    home = os.path.realpath(layered_rig.home)
    before = sorted(os.listdir(home)), sorted(os.listdir(home + "/l"))
    for step in ("unionfs.host.disk.write_file", "unionfs.drivers.overlay_home._copy_root"):
        with monkeypatch.context() as patch:
            patch.setattr(step, _full)
            with pytest.raises(OSError, match="No space"):
                layered_rig.driver.create("x", "base")
        assert (sorted(os.listdir(home)), sorted(os.listdir(home + "/l"))) == before
    layered_rig.driver.create("x", "base")


def _full(*_: object) -> None:
    raise OSError(28, "No space left on device")
