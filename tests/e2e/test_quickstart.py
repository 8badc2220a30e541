"""scripts/quickstart and scripts/setup, run as a person runs them."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import signal
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from quickstart_steps import deb

pytestmark = [pytest.mark.engine]

APPLETS = ("sh", "cat", "cp", "echo", "ls", "mkdir", "mv", "rm", "sed", "tail", "test", "touch", "true")


def make_rootfs(root: Path) -> None:
    """A root file system of one program."""
    busybox = shutil.which("busybox")
    assert busybox is not None, "busybox is missing; run scripts/setup --dev"
    for directory in ("bin", "etc", "proc", "dev", "tmp", "var/lib/things", "usr/share/doc"):
        (root / directory).mkdir(parents=True)
    shutil.copy(busybox, root / "bin/busybox")
    for applet in APPLETS:
        (root / "bin" / applet).symlink_to("busybox")
    (root / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\n")
    (root / "usr/share/doc/readme").write_text("read me\n")


@pytest.fixture
def small_rootfs(tmp_path: Path) -> Path:
    """A small root file system, with a name that has to be quoted in mount options."""
    root = tmp_path / "root, with: a \\name"
    make_rootfs(root)
    return root


def digest(root: Path) -> str:
    """A checksum over everything in a tree but access times."""
    total = hashlib.sha256()
    for path in sorted(root.rglob("*")):
        info = path.lstat()
        total.update(f"{path} {info.st_mode} {info.st_uid} {info.st_gid} {info.st_mtime_ns} {info.st_ino}\n".encode())
        if stat.S_ISREG(info.st_mode):
            total.update(path.read_bytes())
        elif stat.S_ISLNK(info.st_mode):
            total.update(os.readlink(path).encode())
    return total.hexdigest()


class Quickstart:
    """Runs the script with a cache of its own."""

    def __init__(self, repository: Path, cache: Path) -> None:
        self.cache = cache
        self.argv = [str(repository / "scripts/quickstart"), "--cache", str(cache)]

    def __call__(self, *arguments: str, status: int = 0) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [*self.argv, *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        assert done.returncode == status, done.stdout + done.stderr
        return done

    def left_over(self) -> list[str]:
        """Directories of runs, and processes that work in the cache."""
        runs = self.cache / "runs"
        found = [str(path) for path in runs.iterdir()] if runs.exists() else []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                command = (process / "cmdline").read_bytes()
            except OSError:
                continue
            if os.fsencode(self.cache) in command:
                found.append(command.decode(errors="replace"))
        return found


@pytest.fixture
def quickstart(repository: Path, tmp_path: Path) -> Iterator[Quickstart]:
    script = Quickstart(repository, tmp_path / "cache")
    yield script
    assert script.left_over() == []


def changes_in(output: str) -> set[str]:
    return set(re.findall(r"^[ACD] /.*$", output, re.MULTILINE))


SMALL_CHANGES = {
    "C /etc",
    "A /etc/motd",
    "C /etc/passwd",
    "A /root",
    "A /root/new-file",
    "C /usr",
    "C /usr/share",
    "D /usr/share/doc",
    "A /usr/share/moved-doc",
    "A /usr/share/moved-doc/readme",
}


def test_directory(quickstart: Quickstart, small_rootfs: Path) -> None:
    before = digest(small_rootfs)
    said = quickstart("--rootfs", str(small_rootfs)).stdout
    assert changes_in(said) == SMALL_CHANGES
    assert "5 added (A), 4 changed (C), 1 deleted (D)" in said
    assert re.search(r"^lower +\d+ +[\d.]+ MiB  ", said, re.MULTILINE)
    assert re.search(r"^upper +\d+ +[\d.]+ KiB  ", said, re.MULTILINE)
    assert digest(small_rootfs) == before


@pytest.mark.parametrize("option", ["", "--gzip", "--xz", "--zstd"])
def test_archive(quickstart: Quickstart, small_rootfs: Path, tmp_path: Path, option: str) -> None:
    archive = tmp_path / "rootfs.tar"
    packing = [
        "tar",
        "--create",
        f"--file={archive}",
        f"--directory={small_rootfs}",
        *([option] if option else []),
        ".",
    ]
    subprocess.run(packing, check=True)
    assert changes_in(quickstart("--rootfs", str(archive)).stdout) == SMALL_CHANGES


def test_keep(quickstart: Quickstart, small_rootfs: Path) -> None:
    said = quickstart("--rootfs", str(small_rootfs), "--keep").stdout
    found = re.search(r"^Kept in (\S+);", said, re.MULTILINE)
    assert found
    kept = Path(found[1])
    assert (kept / "upper/root/new-file").read_text() == "new\n"
    quickstart("--rootfs", str(small_rootfs))  # another run leaves it alone
    assert (kept / "upper/root/new-file").exists()
    shutil.rmtree(kept)


# Runs "$@" as a user that exists in this mount namespace only, with a /dev/fuse that everybody may open.
AS_USER = """
set -e
for file in passwd group subuid subgid; do cp "/etc/$file" "$PLACE/$file" 2>/dev/null || : > "$PLACE/$file"; done
echo "quickstart:x:64001:64001::$PLACE:/bin/sh" >> "$PLACE/passwd"
echo "quickstart:x:64001:" >> "$PLACE/group"
for file in subuid subgid; do echo "quickstart:2000000:65536" >> "$PLACE/$file"; touch "/etc/$file"; done
for file in passwd group subuid subgid; do mount --bind "$PLACE/$file" "/etc/$file"; done
mkdir "$PLACE/device"
mount -t tmpfs tmpfs "$PLACE/device"
mknod -m 666 "$PLACE/device/fuse" c 10 229
mount --bind "$PLACE/device/fuse" /dev/fuse
exec setpriv --reuid=64001 --regid=64001 --clear-groups env -i PATH=/usr/bin:/bin "HOME=$PLACE/home" "$@"
"""


@pytest.fixture
def public_directory() -> Iterator[Path]:
    """A directory that other users may enter; pytest's own are closed to them."""
    with tempfile.TemporaryDirectory(prefix="unionfs-test-", dir="/var/tmp") as path:
        os.chmod(path, 0o755)
        yield Path(path)


def test_ordinary_user(repository: Path, public_directory: Path) -> None:
    """As a user who is not root: in a user namespace, with an archive that has files of several owners."""
    if not all(path.stat().st_mode & 0o005 == 0o005 for path in (repository, *repository.parents)):
        pytest.skip(f"{repository} is in a directory that other users cannot read")
    root, home = public_directory / "root", public_directory / "home"
    make_rootfs(root)
    os.chown(root / "usr/share/doc/readme", 5, 60)
    subprocess.run(["tar", "-cf", public_directory / "rootfs.tar", "-C", root, "."], check=True)
    home.mkdir()
    os.chown(home, 64001, 64001)
    as_user = ["unshare", "--mount", "--propagation", "private", "sh", "-c", AS_USER, "sh"]
    done = subprocess.run(
        [*as_user, str(repository / "scripts/quickstart"), "--keep", "--rootfs", str(public_directory / "rootfs.tar")],
        env=os.environ | {"PLACE": str(public_directory)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert changes_in(done.stdout) == SMALL_CHANGES
    (run,) = (home / ".cache/unionfs/runs").iterdir()
    # In the namespace, 0 is the user and 1 the first id of the range.
    assert (run / "lower/usr/share/doc/readme").stat().st_uid == 2000000 + 5 - 1
    assert (run / "upper/root/new-file").stat().st_uid == 64001


@pytest.mark.timeout(600)
def test_default(quickstart: Quickstart) -> None:
    """The main job, twice: the second time with the root file system from the cache."""
    said = quickstart().stdout
    lines = changes_in(said)
    assert "Building Debian bookworm" in said
    assert "Hello from a program installed in the upper layer" in said
    assert {"A /usr/bin/unionfs-hello", "A /var/lib/unionfs-hello/state", "C /var/lib/dpkg/status"} <= lines
    assert {"D /usr/share/zoneinfo", "D /usr/share/doc/tzdata", "C /etc/issue"} <= lines
    assert {"D /usr/share/common-licenses", "A /usr/share/moved-licenses/GPL-3"} <= lines
    assert not any(re.match(r". /(proc|dev|tmp)\b", line) for line in lines)
    (rootfs,) = (path for path in quickstart.cache.iterdir() if path.is_dir() and path.name != "runs")
    before = digest(rootfs)
    again = quickstart().stdout
    assert "Building" not in again
    assert changes_in(again) == lines
    assert digest(rootfs) == before


def test_bad_input(quickstart: Quickstart, small_rootfs: Path, tmp_path: Path) -> None:
    no_tar = tmp_path / "no.tar"
    no_tar.write_text("not an archive\n" * 100)
    broken = tmp_path / "broken.tar.gz"
    subprocess.run(["tar", "-czf", broken, "-C", small_rootfs, "."], check=True)
    os.truncate(broken, 10_000)
    empty = tmp_path / "empty"
    empty.mkdir()
    table = {
        ("--rootfs", str(tmp_path / "missing")): "No such file or directory; check the path after --rootfs",
        ("--rootfs", str(no_tar)): "is not a tar archive",
        ("--rootfs", str(broken)): "give a complete tar archive",
        ("--rootfs", str(empty)): "is not a root file system",
        ("--rootfs", str(small_rootfs), "--deb", deb.build(str(tmp_path))): "is not managed by dpkg; leave out --deb",
        ("--deb", str(no_tar)): "is not a Debian package",
        ("--suite", "Book Worm"): "is not the name of a Debian suite",
        ("--cache", str(no_tar)): "name another directory with --cache",
    }
    for arguments, expected in table.items():
        done = quickstart(*arguments, status=1)
        assert re.fullmatch(rf"quickstart: .*{re.escape(expected)}.*\n", done.stderr), (arguments, done.stderr)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_interrupted(quickstart: Quickstart, small_rootfs: Path, number: signal.Signals) -> None:
    # Nobody reads from it, so appending to it takes for ever.
    os.mkfifo(small_rootfs / "etc/motd")
    process = subprocess.Popen(
        [*quickstart.argv, "--rootfs", str(small_rootfs)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("Editing"):
            break
    assert quickstart.left_over() != []
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    if number == signal.SIGKILL:
        # It cannot clean up, but the kernel ends all its processes and mounts; the next run removes the rest.
        for _ in range(100):
            if len(quickstart.left_over()) == 1:
                break
            time.sleep(0.1)
        (small_rootfs / "etc/motd").unlink()
        quickstart("--rootfs", str(small_rootfs))
    else:
        assert process.returncode == 130
        assert said == "quickstart: interrupted; nothing is left mounted\n"


def test_setup_changes_nothing_the_second_time(repository: Path) -> None:
    subprocess.run([repository / "scripts/setup", "--dev"], check=True, stdin=subprocess.DEVNULL, capture_output=True)
    mark = repository / ".venv/.unionfs-setup"
    before = mark.stat()
    started = time.monotonic()
    for option in ("--dev", "--quiet"):
        done = subprocess.run(
            [repository / "scripts/setup", option], check=True, stdin=subprocess.DEVNULL, capture_output=True, text=True
        )
        assert "..." not in done.stdout, "it installed something"
    assert time.monotonic() - started < 4
    assert mark.stat() == before


def test_setup_refuses_unknown_words(repository: Path) -> None:
    done = subprocess.run([repository / "scripts/setup", "--nonsense"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "setup: unknown argument '--nonsense'; try scripts/setup --help\n"
