"""The commands about layers, containers and the store, as people and scripts run them."""

from __future__ import annotations

import gzip
import io
import json
import os
import pty
import re
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from tests.layers.archives import archive, member
from unionfs.cli.layer_output import human_size
from unionfs.cli.main import main
from unionfs.layers.identity import create_chain_id, diff_id_of
from unionfs.layers.opening import open_store

BASE = archive([member("etc/"), member("etc/conf", "base"), member("gone", "1")])
TOP = archive([member("etc/"), member("etc/conf", "top"), member(".wh.gone")])
BASE_ID = create_chain_id([diff_id_of(BASE)])
TOP_ID = create_chain_id([diff_id_of(BASE), diff_id_of(TOP)])


class Shell:
    """Runs ``unionfs`` on a store of its own."""

    def __init__(self, directory: Path, driver: str, capture: pytest.CaptureFixture[bytes]) -> None:
        self.capture = capture
        self.directory = directory
        self.driver = driver
        (directory / "base.tar.gz").write_bytes(gzip.compress(BASE))
        (directory / "top.tar").write_bytes(TOP)

    def run(self, *words: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        """In a process of its own for what reads stdin, else in this one, which is faster."""
        variables = {"UNIONFS_ROOT": str(self.directory / "root")}
        if stdin:
            command = [sys.executable, "-m", "unionfs.cli.main", *words]
            environment = os.environ | variables
            return subprocess.run(
                command, cwd=self.directory, input=stdin, capture_output=True, env=environment, check=False
            )
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("UNIONFS_ROOT", variables["UNIONFS_ROOT"])
            patch.chdir(self.directory)
            self.capture.readouterr()
            status = main(list(words))
            said = self.capture.readouterr()
        return subprocess.CompletedProcess(words, status, said.out, said.err)

    def out(self, *words: str, stdin: bytes = b"") -> str:
        done = self.run(*words, stdin=stdin)
        assert done.returncode == 0, done.stderr.decode()
        assert done.stderr == b""
        return done.stdout.decode()

    def json(self, *words: str) -> Any:
        return json.loads(self.out(*words, "--json"))

    def fails(self, *words: str, stdin: bytes = b"", status: int = 1) -> str:
        """What it says; one line."""
        done = self.run(*words, stdin=stdin)
        assert done.returncode == status
        text = done.stderr.decode()
        assert text.startswith("unionfs: ")
        assert text.count("\n") == 1
        return text


@pytest.fixture
def shell(tmp_path: Path, driver: str, capfdbinary: pytest.CaptureFixture[bytes]) -> Iterator[Shell]:
    made = Shell(tmp_path, driver, capfdbinary)
    assert made.out("layer", "ls", "--driver", driver) == "There are no layers.\n"
    yield made
    with open_store(tmp_path / "root", driver) as store:
        store.cleanup()


def test_from_archives_to_a_container_and_back(shell: Shell) -> None:
    assert shell.out("layer", "register", "base.tar.gz", "top.tar").split() == [BASE_ID, TOP_ID]
    listed = {one["chain_id"]: one for one in shell.json("layer", "ls")}
    assert listed.keys() == {BASE_ID, TOP_ID}
    assert (listed[TOP_ID]["parent"], listed[TOP_ID]["depth"], listed[TOP_ID]["diff_id"]) == (
        BASE_ID,
        2,
        diff_id_of(TOP),
    )
    assert BASE_ID[7:19] in shell.out("layer", "ls")
    assert shell.out("layer", "verify") == "2 layers verified.\n"
    assert shell.out("layer", "export", TOP_ID[7:19], "-o", "out.tar") == ""
    assert (shell.directory / "out.tar").read_bytes() == TOP
    (shell.directory / "null").symlink_to("/dev/null")
    assert shell.out("layer", "export", TOP_ID[7:19], "-o", "null") == ""
    assert (shell.directory / "null").is_char_device(), "a device is written to, not replaced"
    assert shell.run("layer", "export", BASE_ID).stdout == BASE
    assert shell.out("layer", "diff", TOP_ID) == "C /etc\nC /etc/conf\nD /gone\n"
    assert {one["path"] for one in shell.json("layer", "diff", BASE_ID)} == {"/etc", "/etc/conf", "/gone"}

    assert shell.out("container", "create", TOP_ID, "--name", "c1") == "c1\n"
    path = Path(shell.out("container", "mount", "c1").strip())
    assert (path / "etc" / "conf").read_text() == "top"
    assert not (path / "gone").exists()
    (path / "hello").write_text("from the container")
    assert shell.out("container", "mount", "c1").strip() == str(path)
    assert shell.json("container", "ls", "--size")[0]["size"] == len("from the container")
    assert shell.out("container", "diff", "c1") == "A /hello\n"
    committed = shell.out("container", "commit", "c1").strip()
    assert shell.out("layer", "diff", committed) == "A /hello\n"
    if shell.driver != "vfs":
        assert shell.json("container", "ls")[0]["mounted_at"] == str(path)
        assert "container c1 is mounted" in shell.fails("container", "rm", "c1")
    assert shell.out("container", "umount", "c1") == ""
    if shell.driver != "vfs":
        assert "container c1 is not mounted" in shell.fails("container", "umount", "c1")
    with tarfile.open(fileobj=io.BytesIO(shell.run("container", "export", "c1").stdout)) as tar:
        assert sorted(tar.getnames()) == ["etc", "etc/conf", "hello"]
    with tarfile.open(fileobj=io.BytesIO(shell.run("container", "export", "--changes", "c1").stdout)) as tar:
        assert tar.getnames() == ["hello"]

    assert "is needed by container c1, layer" in shell.fails("layer", "rm", TOP_ID)
    tree = shell.out("layer", "tree").splitlines()
    assert [line.split()[0] for line in tree] == [BASE_ID[7:19], TOP_ID[7:19], "container", committed[7:19]]
    assert [len(line) - len(line.lstrip()) for line in tree] == [0, 2, 4, 4]
    (bottom,) = shell.json("layer", "tree")
    (middle,) = bottom["above"]
    assert [bottom["chain_id"], middle["chain_id"]] == [BASE_ID, TOP_ID]
    assert middle["above"][0] == {"container": "c1"}
    assert middle["above"][1] == {"chain_id": committed, "diff_size": len("from the container"), "above": []}
    assert shell.out("container", "rm", "c1") == ""
    assert len(shell.json("layer", "ls")) == 3
    assert shell.out("layer", "rm", committed).split() == [committed]
    assert shell.out("layer", "rm", "--parents", TOP_ID).split() == [TOP_ID, BASE_ID]
    assert shell.json("fsck", "--deep") == []


def test_stdin_and_expected_digest(shell: Shell) -> None:
    assert shell.out("layer", "register", "-", "--expect", diff_id_of(TOP), stdin=TOP).strip() == diff_id_of(TOP)
    assert "was expected" in shell.fails(
        "layer", "register", "base.tar.gz", "--expect", diff_id_of(TOP), "-p", diff_id_of(TOP)
    )
    assert len(shell.json("layer", "ls")) == 1


def test_inspect(shell: Shell) -> None:
    shell.out("layer", "register", "base.tar.gz", "top.tar")
    (facts,) = shell.json("layer", "inspect", TOP_ID)
    assert facts["driver"] == shell.driver
    assert facts["parent"] == BASE_ID
    key = "SourceDir" if shell.driver == "vfs" else "UpperDir"
    assert facts["cache_id"] in facts["driver_data"][key]
    text = shell.out("layer", "inspect", TOP_ID)
    assert f"chain id: {TOP_ID}" in text
    assert f"  {key}: " in text


def test_damage_is_found_and_repaired(shell: Shell) -> None:
    shell.out("layer", "register", "base.tar.gz", "top.tar")
    (top,) = shell.json("layer", "inspect", TOP_ID)
    data = top["driver_data"]
    file = Path(data["SourceDir" if shell.driver == "vfs" else "UpperDir"], "etc/conf")
    file.write_text("TOP")
    assert 'file integrity checksum failed for "etc/conf"' in shell.fails("layer", "verify")
    (result,) = [one for one in json.loads(shell.run("layer", "verify", "--json").stdout) if not one["ok"]]
    assert result["chain_id"] == TOP_ID
    assert shell.json("fsck") == []
    done = shell.run("fsck", "--deep")
    assert done.returncode == 1
    assert f"damage {TOP_ID}" in done.stdout.decode()
    assert "[repaired]" in shell.out("fsck", "--deep", "--repair")
    assert shell.json("fsck", "--deep") == []
    assert shell.out("layer", "register", "-p", BASE_ID, "top.tar").strip() == TOP_ID
    assert shell.out("layer", "verify", TOP_ID) == "1 layer verified.\n"


def test_garbage(shell: Shell) -> None:
    shell.out("layer", "register", "base.tar.gz")
    with open_store(shell.directory / "root", shell.driver) as store:
        store.driver.create("0" * 64, "")
        store.driver.create("1" * 64, "0" * 64)
    listed = shell.json("gc", "--dry-run")
    assert [(one["kind"], one["name"]) for one in listed] == [("tree", "0" * 64), ("tree", "1" * 64)]
    assert "2 things would be removed" in shell.out("gc", "-n")
    assert shell.run("fsck").returncode == 1
    assert "2 things removed" in shell.out("gc")
    assert shell.json("gc") == []
    assert shell.json("fsck") == []
    assert [one["name"] for one in shell.json("gc", "--layers")] == [BASE_ID]
    assert shell.json("layer", "ls") == []


@pytest.mark.parametrize("driver", ["vfs"])
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("layer", "register", "missing.tar"), "missing.tar: No such file or directory; name a tar archive"),
        (("layer", "register", "."), "Is a directory; name a tar archive"),
        (("layer", "register", "notes.txt"), "notes.txt: the archive"),
        (("layer", "register", "top.tar", "--parent", "sha256:00"), "layer does not exist: sha256:00"),
        (("layer", "register", "top.tar", "--expect", "md5:00"), "invalid expected digest 'md5:00'"),
        (("layer", "export", "nope"), "layer does not exist: nope; unionfs layer ls"),
        (("layer", "inspect", ""), "layer does not exist"),
        (("layer", "rm", "nope"), "layer does not exist: nope"),
        (("container", "create", "nope"), "layer does not exist: nope"),
        (("container", "mount", "nope"), "there is no container nope; unionfs container ls"),
        (("container", "create", "--name", "a/b"), "cannot be named 'a/b'"),
        (("layer", "ls", "--driver", "nosuch"), "nosuch"),
        (("layer", "ls", "--root", "notes.txt"), "cannot use "),
    ],
)
def test_wrong_commands_are_answered_in_one_line(shell: Shell, words: tuple[str, ...], said: str) -> None:
    (shell.directory / "notes.txt").write_text("no archive, but longer than a block of one: " * 20)
    assert said in shell.fails(*words)


@pytest.mark.parametrize("driver", ["vfs"])
@pytest.mark.parametrize(
    "words",
    [
        ("layer", "register"),
        ("layer", "register", "a", "b", "--expect", "x"),
        ("container", "create", "--storage-opt", "x"),
    ],
)
def test_wrong_usage(shell: Shell, words: tuple[str, ...]) -> None:
    shell.fails(*words, status=2)


@pytest.mark.parametrize("driver", ["vfs"])
def test_a_store_in_use(shell: Shell) -> None:
    """What only lists goes on at once; what reads all of it or changes something waits, and says for whom."""
    with open_store(shell.directory / "root", "vfs") as store:
        store.register(io.BytesIO(BASE))
        assert BASE_ID[7:19] in shell.out("layer", "ls", stdin=b"a process of its own")
        assert shell.json("container", "ls") == []
        assert "There are no images" in shell.out("image", "ls")
        waiting = [
            subprocess.Popen(
                [sys.executable, "-m", "unionfs.cli.main", *words],
                cwd=shell.directory,
                env=os.environ | {"UNIONFS_ROOT": str(shell.directory / "root")},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for words in (("layer", "register", "base.tar.gz", "top.tar"), ("layer", "verify"), ("gc",))
        ]
        for process in waiting:
            assert process.stderr is not None
            said = process.stderr.readline()
            layerdb = shell.directory / "root" / "image" / "vfs" / "layerdb"
            assert said == f"unionfs: waiting: the layer store {layerdb} is in use by process {os.getpid()}\n"
    assert [process.wait(60) for process in waiting] == [0, 0, 0]
    assert waiting[0].communicate() == (f"{BASE_ID}\n{TOP_ID}\n", "")
    for process in waiting[1:]:
        assert process.communicate()[1] == ""


@pytest.mark.parametrize("driver", ["vfs"])
def test_commands_in_a_pipe(shell: Shell) -> None:
    """None waits for the store while the other waits for it: standard input is read first."""
    shell.out("layer", "register", "base.tar.gz")
    shell.out("container", "create", BASE_ID, "-n", "c")
    big = os.urandom(1 << 20)
    Path(shell.out("container", "mount", "c").strip(), "big").write_bytes(big)
    unionfs = f"{sys.executable} -m unionfs.cli.main"
    done = subprocess.run(
        ["sh", "-c", f"{unionfs} container export c | gzip | {unionfs} layer register -"],
        env=os.environ | {"UNIONFS_ROOT": str(shell.directory / "root")},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert len(shell.json("layer", "ls")) == 2
    with tarfile.open(fileobj=io.BytesIO(shell.run("layer", "export", done.stdout.strip()).stdout)) as tar:
        file = tar.extractfile("big")
        assert file is not None
        assert file.read() == big


@contextmanager
def read_only(path: Path) -> Iterator[None]:
    subprocess.run(["mount", "--bind", path, path], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", path], check=True)
        yield
    finally:
        subprocess.run(["umount", path], check=True)


def test_a_store_on_a_read_only_file_system(shell: Shell) -> None:
    """All that only reads works; all that changes says why not."""
    shell.out("layer", "register", "base.tar.gz", "top.tar")
    shell.out("container", "create", TOP_ID, "--name", "c")
    # What a crash left cannot be cleaned up, and is no reason to show nothing.
    write_set = shell.directory / "root" / "image" / shell.driver / "layerdb" / "tmp" / "write-set-crashed"
    write_set.mkdir()
    reading: list[tuple[str, ...]] = [
        ("layer", "ls"),
        ("layer", "tree"),
        ("layer", "inspect", TOP_ID),
        ("layer", "verify"),
        ("layer", "export", TOP_ID),
        ("layer", "diff", TOP_ID),
        ("container", "ls"),
        ("container", "ls", "--size"),
        ("container", "diff", "c"),
        ("container", "export", "--changes", "c"),
        ("image", "ls"),
    ]
    expected = {words: shell.run(*words).stdout for words in reading}
    write_set.mkdir(exist_ok=True)
    with read_only(shell.directory / "root"):
        for words in reading:
            done = shell.run(*words)
            assert (done.returncode, done.stderr) == (0, b""), (words, done.stderr)
            assert done.stdout == expected[words]
        for words in (("fsck",), ("fsck", "--deep"), ("gc", "--dry-run")):
            done = shell.run(*words)
            assert b"an unfinished registration" in done.stdout
            assert b"Read-only" not in done.stderr
        for words in (
            ("layer", "register", "base.tar.gz"),
            ("layer", "rm", TOP_ID),
            ("container", "create"),
            ("container", "mount", "c"),
            ("container", "rm", "c"),
            ("fsck", "--repair"),
            ("gc",),
        ):
            said = shell.fails(*words)
            assert "Read-only file system" in said, said
    assert shell.json("fsck", "--repair")[0]["repaired"]


def test_a_terminal_sees_how_far_it_is(tmp_path: Path) -> None:
    """Of a file, also a compressed one, it is known how much there is to read."""
    (tmp_path / "big.tar.gz").write_bytes(gzip.compress(archive([member("big", os.urandom(3 << 20))])))
    terminal, its_side = pty.openpty()
    program = Path(sys.executable).with_name("unionfs")
    words: list[str | Path] = [
        program,
        "layer",
        "register",
        "--driver",
        "vfs",
        "--root",
        tmp_path / "root",
        tmp_path / "big.tar.gz",
    ]
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=its_side, env=os.environ | {"TERM": "xterm"}
    ) as process:
        os.close(its_side)
        said = b""
        with suppress(OSError):  # EIO, when the other side is closed
            while piece := os.read(terminal, 4096):
                said += piece
        os.close(terminal)
        assert process.stdout is not None
        assert process.stdout.read().startswith(b"sha256:")
        assert process.wait() == 0
    text = re.sub(rb"\x1b\[[0-9;?]*[a-zA-Z]", b"", said).decode()
    assert "big.tar.gz" in text
    assert "3.0/3.0 MiB" in text


def test_nothing_is_made_for_a_driver_that_does_not_exist(
    tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    Shell(tmp_path, "vfs", capfdbinary).fails("layer", "ls", "--driver", "nosuch")
    assert not (tmp_path / "root" / "image").exists()


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (1536, "1.50 KiB"),
        (10 << 20, "10.0 MiB"),
        (999 << 30, "999 GiB"),
    ],
)
def test_human_size(size: int, text: str) -> None:
    assert human_size(size) == text
