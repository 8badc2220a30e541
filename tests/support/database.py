"""A database as package managers have one: large, rewritten by several processes at a time, checked to the last row.

Run as a program inside of a mount, which may be that of another user: ``make``, ``rewrite`` or ``check``, and the file.
"""

from __future__ import annotations

import os
import random
import sqlite3
import subprocess
import sys
import zlib
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Final

_ROWS: Final = 22_000
_ROW_BYTES: Final = 4000
_CHANGED_ROWS: Final = 150  # by one transaction
_TRANSACTIONS: Final = 4
_WRITERS: Final = 3


def _opened(path: str) -> sqlite3.Connection:
    database = sqlite3.connect(path, timeout=120, isolation_level=None)
    database.execute(f"PRAGMA mmap_size = {1 << 30}")
    return database


def make(path: str) -> None:
    """A database of 90 MB at ``path``."""
    with closing(_opened(path)) as database:
        database.execute("PRAGMA synchronous = OFF")
        database.execute("CREATE TABLE packages (id INTEGER PRIMARY KEY, version INTEGER, body BLOB, sum INTEGER)")
        database.execute("CREATE TABLE changes (count INTEGER)")
        database.execute("BEGIN")
        bodies = (os.urandom(_ROW_BYTES) for _ in range(_ROWS))
        rows = ((number, 0, body, zlib.crc32(body)) for number, body in enumerate(bodies))
        database.executemany("INSERT INTO packages VALUES (?, ?, ?, ?)", rows)
        database.execute("CREATE INDEX sums ON packages (sum)")
        database.execute("INSERT INTO changes VALUES (0)")
        database.execute("COMMIT")
    assert os.stat(path).st_size > 90_000_000


def _change_rows(path: str, seed: str) -> None:
    chance = random.Random(seed)
    with closing(_opened(path)) as database:
        for _ in range(_TRANSACTIONS):
            database.execute("BEGIN IMMEDIATE")
            for number in chance.sample(range(_ROWS), _CHANGED_ROWS):
                body = chance.randbytes(_ROW_BYTES)
                database.execute(
                    "UPDATE packages SET version = version + 1, body = ?, sum = ? WHERE id = ?",
                    (body, zlib.crc32(body), number),
                )
            database.execute("UPDATE changes SET count = count + ?", (_CHANGED_ROWS,))
            database.execute("COMMIT")
            database.execute("SELECT count(*), sum(version) FROM packages").fetchone()


def rewrite(path: str) -> None:
    """Have several processes change rows, with a rollback journal and with a log, and write the whole file anew."""
    for mode in ("wal", "delete"):
        with closing(_opened(path)) as database:
            assert database.execute(f"PRAGMA journal_mode = {mode}").fetchone() == (mode,)
        run_all([["change", path, f"{mode} {number}"] for number in range(_WRITERS)])
    with closing(_opened(path)) as database:
        database.execute("VACUUM")


def check(path: str) -> None:
    """Fail unless every row is one that was written whole, and there are as many changes as were made."""
    with closing(_opened(path)) as database:
        assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        versions = 0
        for number, (version, body, checksum) in enumerate(
            database.execute("SELECT version, body, sum FROM packages ORDER BY id")
        ):
            assert zlib.crc32(body) == checksum, f"row {number} is damaged"
            versions += version
        assert database.execute("SELECT count(*) FROM packages").fetchone() == (_ROWS,)
        assert database.execute("SELECT count FROM changes").fetchone() == (versions,)
        assert versions == 2 * _WRITERS * _TRANSACTIONS * _CHANGED_ROWS


def run_all(commands: Sequence[Sequence[str]]) -> None:
    """Run this program with each of ``commands`` at the same time."""
    repository = Path(__file__).resolve().parent.parent.parent
    running = [
        subprocess.Popen([sys.executable, "-m", "tests.support.database", *words], cwd=repository) for words in commands
    ]
    assert [process.wait() for process in running] == [0] * len(running)


_STEPS: Final[dict[str, Callable[..., None]]] = {
    "make": make,
    "rewrite": rewrite,
    "check": check,
    "change": _change_rows,
}

if __name__ == "__main__":
    _STEPS[sys.argv[1]](*sys.argv[2:])
