"""The work directory: who may use it, and what it hands on to the files that are made in it."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.programs import layer_options, server_of
from tests.support.mounts import is_running, mount_program, mounted_image, servers_of, take_down
from tests.support.sandbox import Sandbox, needs_root
from unionfs.errors import LayerError
from unionfs.fuse_ops.stack.workdir import WorkDir, prepare_workdir

pytest_plugins = ["tests.support.sandbox"]
needs_root()


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """``upper`` and ``work`` with an ``other`` of each."""
    for name in ("upper", "other-upper", "work", "other-work"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def first(place: Path) -> Iterator[WorkDir]:
    """A server's use of ``upper`` and ``work``."""
    used = prepare_workdir("work", "upper", volatile=False)
    assert used.claim is not None
    assert used.warnings == []
    yield used


@pytest.mark.parametrize(("work", "upper"), [("work", "upper"), ("other-work", "upper"), ("work", "other-upper")])
def test_second_use_is_warned_of(first: WorkDir, work: str, upper: str) -> None:
    second = prepare_workdir(work, upper, volatile=False)
    assert second.claim is None
    (warning,) = second.warnings
    assert f"upperdir {upper} is in use" in warning
    second.close()
    with pytest.raises(LayerError, match="in use by another mount"):
        prepare_workdir(work, upper, volatile=False, exclusive=True)
    first.close()
    third = prepare_workdir(work, upper, volatile=False, exclusive=True)
    assert (third.claim is not None, third.warnings) == (True, [])
    third.close()


def test_server_that_ends_is_waited_for(first: WorkDir) -> None:
    """Its mount is gone, and it still writes; longer than one takes to notice that its mount is gone."""
    assert first.claim is not None
    first.claim.end_soon()
    ended = threading.Event()

    def end() -> None:
        ended.set()
        first.close()

    timer = threading.Timer(1.0, end)
    timer.start()
    second = prepare_workdir("work", "upper", volatile=False)
    assert ended.is_set()
    assert (second.claim is not None, second.warnings) == (True, [])
    second.close()


def test_of_two_that_wait_one_gets_it(first: WorkDir) -> None:
    assert first.claim is not None
    first.claim.end_soon()
    seen: list[list[str]] = []

    def use() -> None:
        used = prepare_workdir("work", "upper", volatile=False)
        seen.append(used.warnings)
        if used.claim is not None:
            used.claim.end_soon()
        used.close()

    threads = [threading.Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    first.close()
    for thread in threads:
        thread.join()
    assert seen == [[]] * 4


def test_mount_again_at_once(box: Sandbox) -> None:
    """umount(8) does not wait for the server; the next mount does."""
    box.lower().file("name", b"text").file("other", b"text")
    with mounted_image(f"{box.root}/image", f"{box.root}/disk") as disk:
        box.upper, box.work = box.new_dir("disk/upper"), box.new_dir("disk/work")
        command = [mount_program(), "-o", layer_options(box), box.target]
        subprocess.run(command, check=True)
        server = server_of(box.target)
        os.unlink(box.at("name"))  # so that there is something left in the work directory, to be removed at the end
        subprocess.run(["fsfreeze", "--freeze", disk], check=True)
        try:
            subprocess.run(["umount", box.target], check=True)
            again = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
            time.sleep(1)
            waited = again.poll() is None and is_running(server)
        finally:
            subprocess.run(["fsfreeze", "--unfreeze", disk], check=True)
        said = again.communicate()[1]
        assert (again.returncode, said, waited) == (0, "", True)
        assert os.listdir(box.target) == ["other"]
        assert take_down(box.target, servers_of(box.target)) == []
