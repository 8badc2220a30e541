"""What snapshots there are: their names, kinds, parents and labels, in a SQLite database.

Every change is one transaction, on stable storage when its call returns. The files are not this module's business: a
snapshot's ``number`` names its directory (:mod:`.directories`).
"""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from unionfs.engines.snapshotter.contract import Info, Kind, Usage
from unionfs.errors import (
    SnapshotArgumentError,
    SnapshotExistsError,
    SnapshotNotFoundError,
    SnapshotStateError,
    SnapshotterError,
)

SCHEMA_VERSION = 1

_SCHEMA = f"""
BEGIN IMMEDIATE;
CREATE TABLE snapshots (
    number      INTEGER PRIMARY KEY,
    name        TEXT    NOT NULL UNIQUE,
    parent      INTEGER REFERENCES snapshots (number) ON DELETE RESTRICT,
    kind        INTEGER NOT NULL CHECK (kind IN (1, 2, 3)),
    created_ns  INTEGER NOT NULL,
    updated_ns  INTEGER NOT NULL,
    -- Known when it is committed.
    size_bytes  INTEGER,
    inodes      INTEGER,
    redirected  INTEGER NOT NULL DEFAULT 0  -- a directory in it was renamed: parts of it lie elsewhere in its parents
) STRICT;
CREATE INDEX snapshots_by_parent ON snapshots (parent);
CREATE TABLE labels (
    snapshot    INTEGER NOT NULL REFERENCES snapshots (number) ON DELETE CASCADE,
    key         TEXT    NOT NULL,
    value       TEXT    NOT NULL,
    PRIMARY KEY (snapshot, key)
) STRICT, WITHOUT ROWID;
PRAGMA user_version = {SCHEMA_VERSION};
COMMIT;
"""

_COLUMNS = """
    SELECT s.number, s.name, coalesce(p.name, ''), s.kind, s.created_ns, s.updated_ns, s.size_bytes, s.inodes
    FROM snapshots s LEFT JOIN snapshots p ON p.number = s.parent
"""
_CHAIN = """
    WITH RECURSIVE chain (number, parent, redirected, depth) AS (
        SELECT number, parent, redirected, 0 FROM snapshots WHERE number = ?
        UNION ALL
        SELECT s.number, s.parent, s.redirected, depth + 1 FROM snapshots s JOIN chain ON s.number = chain.parent
    )
    SELECT number, redirected FROM chain ORDER BY depth
"""
_DISK_FULL = frozenset({sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR})


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One snapshot.

    Attributes:
        number: names its directory.
        info: what its users know of it.
        usage: what it takes; None as long as it is not committed.
    """

    number: int
    info: Info
    usage: Usage | None


@dataclass(frozen=True, slots=True)
class Chain:
    """Committed snapshots, each made over the next.

    Attributes:
        numbers: their numbers, nearest first.
        redirected: whether in one of them a directory was renamed.
    """

    numbers: tuple[int, ...] = ()
    redirected: bool = False


class SnapshotStore:
    """The database. Its methods may be called from any thread.

    Args:
        path: its file; made where it does not exist.
        snapshots: how many snapshots are there that it should know.

    Raises:
        SnapshotterError: it is damaged, lost, was made by a later version, or cannot be opened.
    """

    def __init__(self, path: str, snapshots: int = 0) -> None:
        self._path = path
        self._snapshots = snapshots
        self._guard = threading.Lock()
        try:
            self._database = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        except sqlite3.Error as error:
            raise SnapshotterError(f"{path}: {error}; see that its directory can be written") from error
        try:
            with self._told():
                self._open()
        except BaseException:
            self._database.close()
            raise

    def _open(self) -> None:
        run = self._database.execute
        (version,) = run("PRAGMA user_version").fetchone()
        if version > SCHEMA_VERSION:
            raise SnapshotterError(
                f"{self._path}: was made by a later version of unionfs (format {version}, known is {SCHEMA_VERSION}); "
                "use that version, or another --root"
            )
        if version == 0 and self._snapshots:
            # Not to be made anew: what a new one does not know would be deleted.
            raise SnapshotterError(
                f"{self._path}: is gone or empty, but there are snapshots ({self._snapshots}) whose owners only it "
                f"knows; bring it back, or move {os.path.dirname(self._path)} away and pull again"
            )
        run("PRAGMA journal_mode = WAL")
        # containerd's own database remembers what we have confirmed, also after a loss of power.
        run("PRAGMA synchronous = FULL")
        run("PRAGMA foreign_keys = ON")
        if version == 0:
            os.chmod(self._path, 0o600)
            self._database.executescript(_SCHEMA)
        (verdict,) = run("PRAGMA quick_check(1)").fetchone()
        if verdict != "ok":
            raise sqlite3.DatabaseError(verdict)

    def close(self) -> None:
        """Close the database; closing twice is harmless."""
        with self._guard:
            self._database.close()

    # Reading

    def get(self, name: str) -> Record:
        """The snapshot ``name``; raises :class:`SnapshotNotFoundError`."""
        with self._reading() as database:
            return self._get(database, name)

    def all(self) -> list[Record]:
        """Every snapshot, sorted by name."""
        with self._reading() as database:
            labels: dict[int, dict[str, str]] = {}
            for number, key, value in database.execute("SELECT snapshot, key, value FROM labels"):
                labels.setdefault(number, {})[key] = value
            rows = database.execute(_COLUMNS + " ORDER BY s.name").fetchall()
            return [_record(row, labels.get(row[0], {})) for row in rows]

    def numbers(self) -> set[int]:
        """The numbers of all snapshots."""
        with self._reading() as database:
            return {number for (number,) in database.execute("SELECT number FROM snapshots")}

    def chain(self, name: str) -> Chain:
        """The committed snapshot ``name`` and those it stands on; an empty chain for an empty name.

        Raises:
            SnapshotNotFoundError: there is none of this name.
            SnapshotArgumentError: it is not committed.
        """
        with self._reading() as database:
            return self._chain(database, name)

    def plan(self, name: str, parent: str) -> Chain:
        """What a new snapshot ``name`` would stand on; :meth:`add` then sees whether it still does.

        Raises:
            SnapshotExistsError: the name is taken.
            SnapshotNotFoundError: there is no such parent.
            SnapshotArgumentError: the parent is not committed.
        """
        with self._reading() as database:
            if self._is_taken(database, name):
                raise _taken(name)
            return self._chain(database, parent)

    def find(self, parent: str, label: str, value: str) -> str | None:
        """The name of a committed snapshot over ``parent``, empty for none, with this label; None if there is none."""
        with self._reading() as database:
            row = database.execute(
                "SELECT s.name FROM snapshots s JOIN labels l ON l.snapshot = s.number"
                " LEFT JOIN snapshots p ON p.number = s.parent"
                " WHERE l.key = ? AND l.value = ? AND s.kind = ? AND coalesce(p.name, '') = ?",
                (label, value, int(Kind.COMMITTED), parent),
            ).fetchone()
            return None if row is None else str(row[0])

    def check_free(self, name: str) -> None:
        """Raise :class:`SnapshotExistsError` when the name is taken."""
        with self._reading() as database:
            if self._is_taken(database, name):
                raise _taken(name)

    # Changing

    def add(
        self, number: int, kind: Kind, name: str, parent: str, labels: Mapping[str, str], *, planned: Chain
    ) -> None:
        """Add an active snapshot or a view. From now on its parents stay.

        Args:
            number: names its directory.
            kind: what it is.
            name: its key.
            parent: what it is made over; empty for nothing.
            labels: texts that its users attached.
            planned: what its files were made for.

        Raises:
            SnapshotExistsError: the name is taken.
            SnapshotNotFoundError: there is no such parent.
            SnapshotArgumentError: the parent is not committed.
            SnapshotterError: the parent is not the one that was planned with.
        """
        now = time.time_ns()
        with self._changing() as database:
            if self._chain(database, parent) != planned:
                raise SnapshotterError(f"parent snapshot {parent} was replaced meanwhile; try again")
            above = planned.numbers[0] if planned.numbers else None
            try:
                database.execute(
                    "INSERT INTO snapshots (number, name, parent, kind, created_ns, updated_ns)"
                    " VALUES (?, ?, ?, ?, ?, ?)",
                    (number, name, above, int(kind), now, now),
                )
            except sqlite3.IntegrityError:
                raise _taken(name) from None
            self._set_labels(database, number, labels)

    def commit(self, key: str, name: str, labels: Mapping[str, str], usage: Usage, *, redirected: bool) -> None:
        """Make the active snapshot ``key`` the committed snapshot ``name`` with these labels.

        Raises:
            SnapshotExistsError: the name is taken.
            SnapshotStateError: ``key`` is not active.
        """
        now = time.time_ns()
        with self._changing() as database:
            record = self._get(database, key)
            check_active(record)
            try:
                database.execute(
                    "UPDATE snapshots SET name = ?, kind = ?, created_ns = ?, updated_ns = ?,"
                    " size_bytes = ?, inodes = ?, redirected = ? WHERE number = ?",
                    (name, int(Kind.COMMITTED), now, now, *usage, int(redirected), record.number),
                )
            except sqlite3.IntegrityError:
                raise _taken(name) from None
            self._set_labels(database, record.number, labels)

    def set_labels(self, name: str, change: Mapping[str, str], *, replace: bool) -> Info:
        """Change labels: those in ``change``, or with ``replace`` all. An empty value removes one."""
        with self._changing() as database:
            record = self._get(database, name)
            labels = dict(change) if replace else {**record.info.labels, **change}
            self._set_labels(database, record.number, labels)
            # A clock that was set back must not make the change older than what it changes.
            now = max(time.time_ns(), record.info.created_ns)
            database.execute("UPDATE snapshots SET updated_ns = ? WHERE number = ?", (now, record.number))
            return self._get(database, name).info

    def remove(self, name: str) -> Record:
        """Remove a snapshot and return what it was.

        Raises:
            SnapshotStateError: it is the parent of others.
        """
        with self._changing() as database:
            record = self._get(database, name)
            query = "SELECT name FROM snapshots WHERE parent = ? ORDER BY name LIMIT 1"
            child = database.execute(query, (record.number,)).fetchone()
            if child is not None:
                raise SnapshotStateError(f"cannot remove snapshot {name}: {child[0]} stands on it; remove that first")
            database.execute("DELETE FROM snapshots WHERE number = ?", (record.number,))
            return record

    # Inside of transactions

    @staticmethod
    def _get(database: sqlite3.Connection, name: str) -> Record:
        row = database.execute(_COLUMNS + " WHERE s.name = ?", (name,)).fetchone()
        if row is None:
            raise SnapshotNotFoundError(f"snapshot {name} does not exist")
        labels = database.execute("SELECT key, value FROM labels WHERE snapshot = ?", (row[0],)).fetchall()
        return _record(row, dict(labels))

    @staticmethod
    def _is_taken(database: sqlite3.Connection, name: str) -> bool:
        return database.execute("SELECT 1 FROM snapshots WHERE name = ?", (name,)).fetchone() is not None

    @classmethod
    def _chain(cls, database: sqlite3.Connection, name: str) -> Chain:
        if not name:
            return Chain()
        rows = database.execute(_CHAIN, (cls._committed(database, name),)).fetchall()
        return Chain(tuple(number for number, _ in rows), any(redirected for _, redirected in rows))

    @staticmethod
    def _committed(database: sqlite3.Connection, name: str) -> int:
        row = database.execute("SELECT number, kind FROM snapshots WHERE name = ?", (name,)).fetchone()
        if row is None:
            raise SnapshotNotFoundError(f"parent snapshot {name} does not exist")
        number, kind = row
        if kind != Kind.COMMITTED:
            raise SnapshotArgumentError(f"parent snapshot {name} is not committed; commit it first")
        return int(number)

    @staticmethod
    def _set_labels(database: sqlite3.Connection, number: int, labels: Mapping[str, str]) -> None:
        database.execute("DELETE FROM labels WHERE snapshot = ?", (number,))
        rows = [(number, key, value) for key, value in labels.items() if value]
        database.executemany("INSERT INTO labels (snapshot, key, value) VALUES (?, ?, ?)", rows)

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        with self._guard, self._told():
            yield self._database

    @contextmanager
    def _changing(self) -> Iterator[sqlite3.Connection]:
        with self._guard, self._told():
            self._database.execute("BEGIN IMMEDIATE")
            try:
                yield self._database
                self._database.execute("COMMIT")
            except BaseException:
                if self._database.in_transaction:
                    self._database.execute("ROLLBACK")
                raise

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Tell SQLite's errors as ours."""
        try:
            yield
        except sqlite3.Error as error:
            code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # without the extension in the other bits
            if code in _DISK_FULL:
                advice = "free space on that disk, and see the system's log for its errors"
            elif isinstance(error, sqlite3.ProgrammingError):
                advice = "the snapshotter is being stopped; try again"
            elif isinstance(error, sqlite3.OperationalError):
                advice = "see that nothing else uses it and that it can be written, and try again"
            else:
                advice = (
                    f"the database is damaged; restore it, or move {os.path.dirname(self._path)} away and pull again"
                )
            raise SnapshotterError(f"{self._path}: {error}; {advice}") from error


def check_active(record: Record) -> None:
    """Raise :class:`SnapshotStateError` unless the snapshot is active, and so can be committed."""
    if record.info.kind is not Kind.ACTIVE:
        kind = record.info.kind.name.lower()
        raise SnapshotStateError(f"cannot commit snapshot {record.info.name}: it is {kind}, not active; prepare one")


def _record(row: tuple[int, str, str, int, int, int, int | None, int | None], labels: dict[str, str]) -> Record:
    number, name, parent, kind, created_ns, updated_ns, size_bytes, inodes = row
    info = Info(name=name, parent=parent, kind=Kind(kind), created_ns=created_ns, updated_ns=updated_ns, labels=labels)
    usage = Usage(size_bytes, inodes) if size_bytes is not None and inodes is not None else None
    return Record(number=number, info=info, usage=usage)


def _taken(name: str) -> SnapshotExistsError:
    return SnapshotExistsError(f"snapshot {name} exists already; remove it, or use another name")
