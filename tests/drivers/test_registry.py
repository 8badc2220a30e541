"""Choosing a driver (contract rows 1-10)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path

import pytest

from tests.drivers.plugin_server import plugin_server
from unionfs.archive.idmapping import IdMapping
from unionfs.drivers import plugin, registry, vfs
from unionfs.drivers.contract import Driver
from unionfs.drivers.registry import Registry, default_registry
from unionfs.errors import (
    DriverError,
    IncompatibleFilesystemError,
    NotSupportedError,
    PrerequisitesError,
    QuotaNotSupportedError,
    UnionfsError,
)


class Named:
    """A driver that can do nothing but say what it was made with."""

    def __init__(self, name: str, home: str, options: Sequence[str]) -> None:
        self.name = name
        self.home = home
        self.options = list(options)


def made(name: str, calls: list[str], error: Exception | None = None):  # type: ignore[no-untyped-def]
    def init(home: str, options: Sequence[str], _: IdMapping) -> Driver:
        calls.append(name)
        if error is not None:
            raise error
        return Named(name, home, options)  # type: ignore[return-value]

    return init


@pytest.fixture
def calls() -> list[str]:
    return []


def registry_of(calls: list[str], **errors: Exception | None) -> Registry:
    result = Registry()
    for name, error in errors.items():
        result.register(name, made(name, calls, error))
    return result


def used(root: Path, name: str) -> None:
    (root / name / "layer").mkdir(parents=True)


def test_registering_twice_is_an_error(calls: list[str]) -> None:
    drivers = registry_of(calls, a=None)
    with pytest.raises(DriverError, match="name already registered: a"):
        drivers.register("a", made("a", calls))
    assert drivers.is_registered("a")
    assert not drivers.is_registered("b")


@pytest.mark.parametrize("name", ["", "a/b", ".", ".."])
def test_name_has_to_be_one_of_a_directory(name: str, calls: list[str]) -> None:
    with pytest.raises(DriverError, match="choose another"):
        Registry().register(name, made(name, calls))


def test_named_driver_has_its_home_below_the_root(tmp_path: Path, calls: list[str]) -> None:
    driver = registry_of(calls, a=None).get_driver("a", str(tmp_path), ["x=y"])
    assert isinstance(driver, Named)
    assert (driver.home, driver.options) == (str(tmp_path / "a"), ["x=y"])


def test_named_driver_is_used_whatever_was_there(tmp_path: Path, calls: list[str]) -> None:
    used(tmp_path, "a")
    used(tmp_path, "b")
    assert registry_of(calls, a=None, b=None, c=None).new(str(tmp_path), "c").name == "c"


def test_unknown_name(tmp_path: Path, calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugin, "SOCKET_DIRECTORY", str(tmp_path))
    with pytest.raises(NotSupportedError, match="driver nothing is not one of ours"):
        registry_of(calls, a=None).get_driver("nothing", str(tmp_path))
    with pytest.raises(NotSupportedError, match="has been removed"):
        registry_of(calls, a=None).get_driver("aufs", str(tmp_path))
    assert calls == []


def test_first_by_priority(tmp_path: Path, calls: list[str]) -> None:
    drivers = registry_of(calls, a=None, b=None, z=None)
    assert drivers.new(str(tmp_path), priority=("gone", "z", "b")).name == "z"
    assert calls == ["z"]


@pytest.mark.parametrize(
    "error", [NotSupportedError, PrerequisitesError, IncompatibleFilesystemError, QuotaNotSupportedError]
)
def test_unsupported_ones_are_passed_over(tmp_path: Path, calls: list[str], error: type[UnionfsError]) -> None:
    drivers = registry_of(calls, a=None, m=error("not here"), z=error("nor here"))
    assert drivers.new(str(tmp_path), priority=("z", "m")).name == "a"
    assert calls == ["z", "m", "a"]


def test_other_errors_end_the_search(tmp_path: Path, calls: list[str]) -> None:
    drivers = registry_of(calls, a=None, z=DriverError("broken"))
    with pytest.raises(DriverError, match="broken"):
        drivers.new(str(tmp_path), priority=("z", "a"))
    drivers = registry_of(calls, a=None, z=RuntimeError("bug"))
    with pytest.raises(RuntimeError, match="bug"):
        drivers.new(str(tmp_path), priority=("z", "a"))


def test_none_works(tmp_path: Path, calls: list[str]) -> None:
    with pytest.raises(NotSupportedError, match=r"no supported storage driver found .*a: not here"):
        registry_of(calls, a=NotSupportedError("not here")).new(str(tmp_path))
    with pytest.raises(NotSupportedError, match="none is registered"):
        Registry().new(str(tmp_path))


def test_the_one_that_was_used_comes_first(tmp_path: Path, calls: list[str]) -> None:
    used(tmp_path, "b")
    assert registry_of(calls, a=None, b=None).new(str(tmp_path), priority=("a", "b")).name == "b"
    assert calls == ["b"]


def test_the_one_that_was_used_must_start(tmp_path: Path, calls: list[str]) -> None:
    used(tmp_path, "b")
    drivers = registry_of(calls, a=None, b=NotSupportedError("kernel too old"))
    with pytest.raises(NotSupportedError, match="kernel too old"):
        drivers.new(str(tmp_path), priority=("a", "b"))
    assert calls == ["b"]


def test_several_that_were_used_is_an_error_before_any_starts(tmp_path: Path, calls: list[str]) -> None:
    for name in ("c", "b", "vfs"):
        used(tmp_path, name)
    drivers = registry_of(calls, a=None, b=None, c=None, vfs=None)
    with pytest.raises(DriverError, match="contains several valid graphdrivers: b, c; cleanup or explicitly choose"):
        drivers.new(str(tmp_path))
    assert calls == []


def test_vfs_never_counts(tmp_path: Path, calls: list[str]) -> None:
    used(tmp_path, "vfs")
    drivers = registry_of(calls, a=None, vfs=None)
    assert drivers.prior_drivers(str(tmp_path)) == []
    assert drivers.new(str(tmp_path), priority=("a", "vfs")).name == "a"


def test_empty_directory_does_not_count(tmp_path: Path, calls: list[str]) -> None:
    # moby's TestIsEmptyDir: nothing; a directory in it; a file in it.
    drivers = registry_of(calls, a=None, b=None, c=None, d=None)
    (tmp_path / "a").mkdir()
    (tmp_path / "b/sub").mkdir(parents=True)
    (tmp_path / "c").mkdir()
    (tmp_path / "c/file").touch()
    assert drivers.prior_drivers(str(tmp_path)) == ["b", "c"]


def test_directory_that_cannot_be_read_counts(tmp_path: Path, calls: list[str]) -> None:
    (tmp_path / "a").write_text("in the way")
    (tmp_path / "b").symlink_to("nowhere")
    assert registry_of(calls, a=None, b=None).prior_drivers(str(tmp_path)) == ["a", "b"]


def test_default_registry_has_ours(tmp_path: Path) -> None:
    drivers = default_registry()
    assert set(drivers.names()) >= {"unionfs", "overlay2", "vfs"}
    assert drivers.new(str(tmp_path / "root")).name == "unionfs"
    assert os.listdir(tmp_path / "root") == ["unionfs"]
    for name in ("overlay2", "vfs"):
        assert drivers.get_driver(name, str(tmp_path / name)).name == name


def test_entry_points_add_drivers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    points = EntryPoints(
        [
            EntryPoint("mine", "unionfs.drivers.vfs:init", "unionfs.drivers"),
            EntryPoint("broken", "no.such.module:init", "unionfs.drivers"),
            EntryPoint("vfs", "no.such.module:init", "unionfs.drivers"),
        ]
    )
    monkeypatch.setattr(registry, "entry_points", lambda group: points.select(group=group))
    drivers = default_registry()
    assert {"mine", "broken"} <= set(drivers.names())
    assert drivers.get_driver("mine", str(tmp_path)).name == "vfs"
    assert (tmp_path / "mine/dir").is_dir()
    # One of somebody else's cannot take our place, and a broken one is passed over but not when it is named.
    assert drivers.get_driver("vfs", str(tmp_path)).name == "vfs"
    assert drivers.new(str(tmp_path / "new"), priority=("broken", "vfs")).name == "vfs"
    with pytest.raises(NotSupportedError, match=r"broken \(no.such.module:init\) cannot be loaded"):
        drivers.get_driver("broken", str(tmp_path))


def test_plugin_is_found_by_its_explicit_name_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sockets = tmp_path / "sockets"
    found = plugin.find_plugin
    monkeypatch.setattr(
        "unionfs.drivers.plugin.find_plugin", lambda name: found(name, str(sockets), [str(tmp_path / "none")])
    )
    drivers = default_registry()
    with plugin_server(str(sockets / "ext.sock"), vfs.init) as server:
        used(tmp_path / "root", "ext")
        assert drivers.new(str(tmp_path / "root"), priority=("vfs",)).name == "vfs"
        assert server.calls == []
        driver = drivers.new(str(tmp_path / "root"), "ext")
        assert driver.name == "ext"
        driver.create("x")
    assert (tmp_path / "root/ext/dir/x").is_dir()
