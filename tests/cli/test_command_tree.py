"""The whole tree of commands, as people and scripts call it: for help, wrongly, into a pipe, on a terminal."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from unionfs.cli.main import main, unionfs
from unionfs.layers import open_store

COLOUR = re.compile(rb"\x1b\[(?:[0-9;]*;)?(?:3[0-9]|4[0-9]|9[0-7])(?:;[0-9;]*)?m")
TIMEOUT_S = 60.0


def tree(
    command: click.Command = unionfs, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Every command with the words that call it."""
    yield path, command
    if isinstance(command, click.Group):
        for name, below in sorted(command.commands.items()):
            yield from tree(below, (*path, name))


COMMANDS = dict(tree())
LEAVES = {path: command for path, command in COMMANDS.items() if not isinstance(command, click.Group)}
SERVERS = {path for path in LEAVES if path[0] == "serve"}
# Those whose last argument takes all words that follow.
GREEDY = {path for path, command in LEAVES.items() for param in command.params if param.nargs == -1}
ASKING_REGISTRIES = {("run",), ("image", "pull")}


def ids(path: tuple[str, ...]) -> str:
    return " ".join(path) or "unionfs"


every_command = pytest.mark.parametrize("path", COMMANDS, ids=ids)


@pytest.fixture(autouse=True)
def own_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Whatever is called uses a store that is there for it alone, and runs where there are no files."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("UNIONFS_ROOT", str(tmp_path / "root"))
    monkeypatch.setenv("COLUMNS", "80")
    return tmp_path / "root"


def needs_words(command: click.Command) -> bool:
    return any(param.required for param in command.params)


def test_the_tree_is_there() -> None:
    assert ("container", "exec") in LEAVES
    assert len(COMMANDS) > 40
    assert {len(path) for path in COMMANDS} == {0, 1, 2}


@every_command
@pytest.mark.parametrize("word", ["--help", "-h"])
def test_help(path: tuple[str, ...], word: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main([*path, word]) == 0
    said = capfd.readouterr()
    assert said.err == ""
    assert said.out.startswith(f"Usage: {' '.join(('unionfs', *path))} ")
    help_text = COMMANDS[path].help
    assert help_text
    assert " ".join(help_text.split(".")[0].split())[:30] in " ".join(said.out.split())
    assert "..." not in said.out.partition("Commands:")[2], "what a command does is said whole"
    for param in COMMANDS[path].params:
        if isinstance(param, click.Option):
            assert param.help, f"{param.name} is not explained"


@every_command
def test_narrow_help(path: tuple[str, ...], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """click draws no help narrower than 50 columns; a narrower terminal folds the lines, and nothing is lost."""
    monkeypatch.setenv("COLUMNS", "40")
    assert main([*path, "--help"]) == 0
    for line in capfd.readouterr().out.splitlines():
        assert len(line) <= 50 or line.startswith("Usage:"), line


@pytest.mark.parametrize("path", [path for path in COMMANDS if path not in SERVERS], ids=ids)
def test_without_words(path: tuple[str, ...], capfd: pytest.CaptureFixture[str]) -> None:
    """A group shows its help, a command that needs words says which; others do what they are for."""
    command = COMMANDS[path]
    status = main(list(path))
    said = capfd.readouterr()
    assert "Traceback" not in said.err
    if isinstance(command, click.Group):
        assert (status, said.out) == (2, "")
        assert said.err.startswith("Usage: ")
    elif needs_words(command) or path == ("mount",):
        assert (status, said.out) == (2, "")
        assert said.err.startswith("unionfs: ")
        assert said.err.count("\n") == 1
        assert said.err.endswith(f"see unionfs {' '.join(path)} --help\n")
    else:
        assert status == 0, said.err


@every_command
@pytest.mark.parametrize(
    "words", [["--no-such-option"], ["--json=x"], ["--root"]], ids=["unknown", "value", "no value"]
)
def test_wrong_options(path: tuple[str, ...], words: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    status = main([*path, *words])
    said = capfd.readouterr()
    assert (status, said.out) == (2, ""), said.err
    assert said.err.startswith("unionfs: ")
    assert said.err.count("\n") == 1
    assert "--help" in said.err


@pytest.mark.parametrize("path", [path for path in LEAVES if path not in GREEDY], ids=ids)
def test_too_many_words(path: tuple[str, ...], capfd: pytest.CaptureFixture[str]) -> None:
    count = sum(isinstance(param, click.Argument) for param in LEAVES[path].params) + 1
    status = main([*path, *["word"] * count])
    said = capfd.readouterr()
    assert (status, said.out) == (2, ""), said.err
    assert "unexpected extra argument" in said.err
    assert said.err.count("\n") == 1


def required_words(path: tuple[str, ...]) -> int:
    return sum(isinstance(param, click.Argument) and param.required for param in LEAVES[path].params)


@pytest.mark.parametrize(
    "path", [path for path in LEAVES if required_words(path) and path not in ASKING_REGISTRIES], ids=ids
)
def test_strange_words(path: tuple[str, ...], capfd: pytest.CaptureFixture[str]) -> None:
    """What is not there, with control characters in its name, is said in one line, escaped."""
    words = ["\x1b[31m\nnot\there"] * required_words(path)
    extra = ["--lower", "/nothing"] if path == ("mount",) else []
    status = main([*path, *extra, *words])
    said = capfd.readouterr()
    assert status in (1, 2, 125), said.err
    assert said.err.count("\n") == 1, said.err
    assert "\x1b" not in said.err
    assert "\t" not in said.err
    assert "Traceback" not in said.err
    assert "internal error" not in said.err


def forked(words: list[str], out: int, err: int) -> int:
    """The exit status of a process that has these for its output, as Python ends it: with all written."""
    pid = os.fork()
    if pid == 0:
        status = 99
        try:
            os.dup2(out, 1)
            os.dup2(err, 2)
            sys.stdout = os.fdopen(1, "w")
            sys.stderr = os.fdopen(2, "w")
            try:
                status = main(words)
            except SystemExit as end:
                status = int(end.code or 0)
            try:
                sys.stdout.flush()
            except OSError:
                status = 120  # and "Exception ignored" on stderr
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@every_command
def test_a_pipe_that_nobody_reads(path: tuple[str, ...], tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with open(tmp_path / "errors", "w+b") as errors:
        status = forked([*path, "--help"], writer, errors.fileno())
        errors.seek(0)
        assert (status, errors.read()) == (1, b"")
    os.close(writer)


@pytest.mark.parametrize("words", [("info",), ("layer", "ls"), ("gc",), ("--help",), ("layer", "rm", "x")], ids=ids)
def test_closed_streams(words: tuple[str, ...], own_store: Path) -> None:
    """Nothing is said to nobody, and nothing of it lands in a file that is opened later."""
    command = f"exec {sys.executable} -m unionfs.cli.main {' '.join(words)} <&- >&- 2>&-"
    done = subprocess.run(["sh", "-c", command], check=False, timeout=TIMEOUT_S)
    assert done.returncode == (1 if "rm" in words else 0)
    open_store(own_store, "vfs").close()
    for path in own_store.rglob("*"):
        assert path.is_dir() or b"unionfs:" not in path.read_bytes()


def on_terminal(words: list[str], *, columns: int = 80, **variables: str) -> tuple[int, bytes]:
    """(exit status, what was shown) of a command on a terminal."""
    terminal, its_side = pty.openpty()
    fcntl.ioctl(its_side, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "NO_COLOR")}
    process = subprocess.Popen(
        [sys.executable, "-m", "unionfs.cli.main", *words],
        stdin=its_side,
        stdout=its_side,
        stderr=its_side,
        env=environment | {"TERM": "xterm-256color"} | variables,
    )
    os.close(its_side)
    shown = b""
    while True:
        try:
            piece = os.read(terminal, 4096)
        except OSError:  # EIO: the other side is closed
            break
        if not piece:
            break
        shown += piece
    os.close(terminal)
    return process.wait(TIMEOUT_S), shown


TABLES = [("mounts",), ("info",), ("df",), ("layer", "ls"), ("image", "ls"), ("container", "ls"), ("volume", "ls")]


@pytest.mark.parametrize("words", TABLES, ids=ids)
@pytest.mark.parametrize("columns", [40, 80])
def test_tables_on_a_terminal_without_colour(words: tuple[str, ...], columns: int) -> None:
    status, shown = on_terminal(list(words), columns=columns, NO_COLOR="1")
    assert status == 0, shown
    assert not COLOUR.search(shown)
    assert b"Traceback" not in shown


def test_no_terminal_gets_no_escapes(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    for words in TABLES:
        assert main(list(words)) == 0
        assert b"\x1b" not in capfdbinary.readouterr().out


WAITING = [
    ("layer", "verify"),
    ("layer", "rm", "x"),
    ("container", "create"),
    ("container", "commit", "x"),
    ("image", "rm", "x"),
    ("run", "--pull", "never", "x"),
    ("fsck",),
    ("gc",),
]


@pytest.mark.parametrize("words", WAITING, ids=ids)
def test_interrupted_while_it_waits(words: tuple[str, ...], own_store: Path) -> None:
    """^C ends a command that waits for the store at once, with the status of that signal and without a word."""
    with open_store(own_store, "vfs"):
        process = subprocess.Popen(
            [sys.executable, "-m", "unionfs.cli.main", *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert process.stderr is not None
        assert select.select([process.stderr], [], [], TIMEOUT_S)[0]
        assert b"waiting: " in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=TIMEOUT_S)
    assert (process.returncode, out, err.strip()) == (130, b"", b"")


def test_how_long_it_waits(own_store: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with open_store(own_store, "vfs"):
        for seconds in ("0", "1.5"):
            begun = time.monotonic()
            assert (
                subprocess.run(
                    [sys.executable, "-m", "unionfs.cli.main", "gc", "--wait", seconds], check=False
                ).returncode
                == 1
            )
            assert time.monotonic() - begun >= float(seconds)
            *waiting, last = capfd.readouterr().err.splitlines()
            assert len(waiting) == (seconds != "0")
            assert last.endswith("; try again later, or wait longer: --wait SECONDS")
    assert main(["gc", "--wait", "0"]) == 0
