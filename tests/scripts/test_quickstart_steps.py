"""The parts of the quickstart that can be tried without mounting anything."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from quickstart_steps import deb, rootfs, userns
from quickstart_steps.apt_sources import Archives, archives_in
from quickstart_steps.errors import CommandFailedError, QuickstartError
from quickstart_steps.report import human_size, measure, printable
from quickstart_steps.sandbox import Sandbox
from quickstart_steps.storage import Storage, remove_tree

DEB822 = "/etc/apt/sources.list.d/debian.sources"
ONE_LINE = "/etc/apt/sources.list"


@pytest.mark.parametrize(
    ("path", "text", "expected"),
    [
        (
            DEB822,
            "Types: deb\n# URIs: http://other/debian\nURIs: http://mirror/debian/\nSuites: bookworm bookworm-updates\n"
            "Components: main\n\nTypes: deb\nURIs: http://mirror/debian-security\nSuites: bookworm-security\n",
            Archives("http://mirror/debian", "http://mirror/debian-security"),
        ),
        (
            DEB822,
            "Types: deb-src\nURIs: http://source/debian\nSuites: bookworm\n\n"
            "Enabled: no\nTypes: deb\nURIs: http://disabled/debian\nSuites: bookworm\n\n"
            "Types: deb\nURIs:\n http://continued/debian\nSuites: bookworm\n",
            Archives("http://continued/debian"),
        ),
        (
            ONE_LINE,
            "# deb http://comment/debian bookworm main\n"
            "deb [arch=amd64 trusted=yes] http://third.party/apt cloud-sdk main\n"
            "deb cdrom:[Debian 12]/ bookworm main\n"
            "deb-src http://source/debian bookworm main\n"
            "deb [signed-by=/x] http://mirror/debian bookworm main contrib\n"
            "deb http://mirror/debian-security bookworm-security main\n",
            Archives("http://mirror/debian", "http://mirror/debian-security"),
        ),
        (
            ONE_LINE,
            "deb http://snap/archive/debian/20250520T000000Z bookworm main\n",
            Archives("http://snap/archive/debian/20250520T000000Z"),
        ),
        (ONE_LINE, "deb http://third.party/ubuntu jammy main\n", Archives()),
    ],
)
def test_only_debians_own_archives_are_used(path: str, text: str, expected: Archives) -> None:
    assert archives_in({path: text}) == expected


def test_sources_of_a_suite() -> None:
    assert [line.split()[2:] for line in Archives("http://a", "http://s").lines("bookworm")] == [
        ["http://a", "bookworm", "main"],
        ["http://a", "bookworm-updates", "main"],
        ["http://s", "bookworm-security", "main"],
    ]
    assert len(Archives().lines("sid")) == 1


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536 * 1024, "1.5 MiB"),
        (5 << 40, "5.0 TiB"),
        (1 << 52, "4096.0 TiB"),
    ],
)
def test_sizes_for_people(size: int, text: str) -> None:
    assert human_size(size) == text


def test_a_path_stays_on_its_line() -> None:
    assert printable(b"/a b/\xc3\xa4") == "/a b/ä"
    assert printable(b"/new\nline/\x1b[31m/\xff") == r"/new\nline/\x1b[31m/\xff"


def test_measuring_counts_a_file_with_two_names_once(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d/a").write_bytes(bytes(100_000))
    alone = measure(str(tmp_path))
    os.link(tmp_path / "d/a", tmp_path / "b")
    both = measure(str(tmp_path))
    assert (alone.entries, both.entries) == (2, 3)
    assert alone.size_bytes == both.size_bytes >= 100_000


def test_an_interrupted_build_is_made_anew(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))

    def interrupted(target: str) -> None:
        os.mkdir(target)
        raise KeyboardInterrupt

    def complete(target: str) -> None:
        os.mkdir(target)
        Path(target, "done").touch()

    with pytest.raises(KeyboardInterrupt):
        storage.cached("rootfs", interrupted)
    assert not (tmp_path / "rootfs").exists()
    (tmp_path / "rootfs.partial").mkdir()  # of one that was killed
    assert os.listdir(storage.cached("rootfs", complete)) == ["done"]
    assert storage.cached("rootfs", interrupted) == str(tmp_path / "rootfs")
    with pytest.raises(KeyboardInterrupt):  # the old one stays until the new one is complete
        storage.cached("rootfs", interrupted, refresh=True)
    assert sorted(os.listdir(tmp_path)) == ["rootfs", "rootfs.contents", "rootfs.lock", "runs"]


def test_a_damaged_directory_is_made_again(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    made = []

    def make(into: str) -> None:
        made.append(into)
        os.makedirs(f"{into}/bin")
        Path(into, "bin/sh").write_text("sh")
        os.symlink("sh", f"{into}/bin/link")

    path = Path(storage.cached("rootfs", make))
    before = storage.contents("rootfs")
    damages: tuple[Callable[[], object], ...] = (
        lambda: None,
        (path / "bin/sh").unlink,
        lambda: (path / "bin/sh").write_text("other"),
        lambda: (path / "bin/sh").chmod(0o600),
        (path / "new").mkdir,
        lambda: os.truncate(tmp_path / "rootfs.contents", 0),
    )
    for number, damage in enumerate(damages):
        damage()
        storage.cached("rootfs", make)
        assert len(made) == number + 1
        assert os.listdir(path) == ["bin"]
        assert (path / "bin/sh").read_text() == "sh"
    assert storage.contents("rootfs") != before  # the times are others
    assert sorted(os.listdir(tmp_path)) == ["rootfs", "rootfs.contents", "rootfs.lock", "runs"]


def test_only_abandoned_runs_are_removed(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    script = (
        "import sys, time; sys.path.insert(0, sys.argv[2])\n"
        "from quickstart_steps.storage import Storage\n"
        "with Storage(sys.argv[1]).run_directory(keep=False) as path: print(path, flush=True); time.sleep(60)\n"
    )
    scripts = str(Path(rootfs.__file__).parent.parent)
    argv = [sys.executable, "-c", script, str(tmp_path), scripts]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        abandoned = other.stdout.readline().strip()
        with storage.run_directory(keep=True) as kept:
            pass
        Storage(str(tmp_path))
        assert os.path.isdir(abandoned)
        other.kill()
    Storage(str(tmp_path))
    assert not os.path.exists(abandoned)
    assert os.path.isdir(kept)
    remove_tree(kept)


def test_what_runs_in_the_sandbox_ends_with_it(tmp_path: Path) -> None:
    with Sandbox() as sandbox:
        sandbox.run(["mount", "-t", "tmpfs", "tmpfs", str(tmp_path)])
        assert sandbox.run(["stat", "--file-system", "--format=%T", str(tmp_path)]) == "tmpfs"
        assert not os.path.ismount(tmp_path)
        sleeper = sandbox.start(["sleep", "1000"])
        assert sandbox.run(["sh", "-c", "echo $$"]) != str(os.getpid())
    assert sleeper.wait(timeout=20) != 0
    assert sleeper.stdout is not None
    sleeper.stdout.close()


def test_a_failed_command_says_which_and_why() -> None:
    with Sandbox() as sandbox, pytest.raises(CommandFailedError, match=r"'sh -c .*' failed with status 3: last words"):
        sandbox.run(["sh", "-c", "echo first; echo last words >&2; exit 3"])


def test_the_package_that_is_installed(tmp_path: Path) -> None:
    assert deb.package_name(deb.build(str(tmp_path))) == deb.PACKAGE
    listing = subprocess.run(
        ["dpkg-deb", "--contents", tmp_path / "unionfs-hello_1.0_all.deb"], capture_output=True, text=True, check=True
    ).stdout
    assert "root/root" in listing
    assert "./usr/bin/unionfs-hello" in listing


def test_an_ordinary_user_without_an_id_range_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(os, "getuid", lambda: 4_000_000)
    monkeypatch.setattr("getpass.getuser", lambda: "nobody-like-this")
    with pytest.raises(QuickstartError, match="no id range in /etc/subuid; run: sudo usermod --add-subuids"):
        userns.become_root([])
