"""The files of snapshots, in directories laid out as those of containerd's overlayfs snapshotter.

::

    root/                     0700
      lock                    the process that uses it
      metadata.sqlite3        what snapshots there are (:mod:`.store`)
      empty/                  what a tree without parents is made over
      snapshots/              0700
        N/                    0700; N-creating and N-removing while it is neither there nor gone
          fs/                 what the snapshot itself has; overlayfs' upper directory, later a lower one
          work/               overlayfs' work directory
          union/              where our file system is mounted, for snapshots that need it
"""

from __future__ import annotations

import itertools
import logging
import os
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from unionfs.drivers import home
from unionfs.drivers.contract import REMOVING
from unionfs.engines.snapshotter.contract import Usage
from unionfs.errors import DriverError, SnapshotterError
from unionfs.host import disk, unmount
from unionfs.host.files import measure_tree

_log = logging.getLogger(__name__)

_REDIRECTS = ("trusted.overlay.redirect", "user.overlay.redirect")


@dataclass(frozen=True, slots=True)
class SnapshotPaths:
    """Where the parts of one snapshot are, as absolute paths."""

    base: str

    @property
    def fs(self) -> str:
        """What the snapshot itself has."""
        return self.base + "/fs"

    @property
    def work(self) -> str:
        """The work directory."""
        return self.base + "/work"

    @property
    def union(self) -> str:
        """The mount point."""
        return self.base + "/union"


class Measured(NamedTuple):
    """What a look at all files of a snapshot told."""

    usage: Usage
    redirected: bool
    """Whether a directory was renamed, so that overlayfs finds its contents under another name in the parents."""


class SnapshotDirectories:
    """The directories below one root. Its callers see to it that a number is used by one of them at a time.

    Attributes:
        root: absolute and without links, as the mount table shows it.
        snapshots: has the snapshots' own directories.
        empty: an empty one.

    Args:
        root: made where it does not exist.

    Raises:
        SnapshotterError: the directories cannot be made.
    """

    def __init__(self, root: str) -> None:
        owner = (os.geteuid(), os.getegid())
        try:
            home.ensure_dir(os.path.abspath(root), 0o700, owner)
            self.root = os.path.realpath(root)
            self.snapshots = os.path.join(self.root, "snapshots")
            self.empty = os.path.join(self.root, "empty")
            for path in (self.snapshots, self.empty):
                home.ensure_dir(path, 0o700, owner)
        except DriverError as error:
            raise SnapshotterError(
                str(error).replace("the driver's directory", "the snapshotter's directory")
            ) from error
        self._numbers = itertools.count(1 + max(self.present(), default=0))

    def paths(self, number: int) -> SnapshotPaths:
        """The parts of a snapshot, existing or not."""
        return SnapshotPaths(f"{self.snapshots}/{number}")

    def create(self, parents: Sequence[int]) -> int:
        """Make the directories of a new snapshot and return its number.

        Args:
            parents: the snapshots that it stands on, nearest first; its root directory is as the nearest one's.
        """
        number = next(self._numbers)
        owner, mode = (os.geteuid(), os.getegid()), 0o755
        with home.new_dir(self.snapshots, str(number), 0o700, owner) as base:
            new = SnapshotPaths(base)
            if parents:
                above = os.stat(self.paths(parents[0]).fs)
                owner, mode = (above.st_uid, above.st_gid), stat.S_IMODE(above.st_mode)
            home.make_dir(new.fs, mode, owner)
            os.mkdir(new.work, 0o700)
            os.mkdir(new.union, 0o700)
            disk.sync_dir(base)
        return number

    def sync(self, number: int) -> None:
        """Bring everything in a snapshot to stable storage."""
        unmount.sync_mount(self.paths(number).fs)

    def measure(self, number: int) -> Measured:
        """Count what a snapshot takes on disk, as du(1) does: blocks, a file with several names once."""
        redirected = False

        def look(fd: int) -> None:
            nonlocal redirected
            redirected = redirected or any(name in _REDIRECTS for name in os.listxattr(fd))

        size = measure_tree(self.paths(number).fs, look)
        return Measured(Usage(size.disk_bytes, size.objects), redirected)

    def set_aside(self, number: int) -> None:
        """Take a snapshot's directory away, with what is mounted in it; :meth:`delete_set_aside` deletes it."""
        home.set_aside(self.snapshots, str(number))

    def recover(self, known: Iterable[int]) -> None:
        """Delete what an earlier process left that belongs to no snapshot of ``known``; only before any is created."""
        for number in self.present() - set(known):
            self.set_aside(number)
        home.sweep(self.snapshots)

    def delete_set_aside(self) -> None:
        """Delete what :meth:`set_aside` took away. What cannot be deleted is logged, and tried again next time."""
        for name in sorted(os.listdir(self.snapshots)):
            if name.endswith(REMOVING):
                try:
                    home.delete(os.path.join(self.snapshots, name))
                except DriverError as error:
                    _log.warning("%s", error)

    def present(self) -> set[int]:
        """The numbers of the snapshots that have a directory."""
        return {int(name) for name in os.listdir(self.snapshots) if name.isascii() and name.isdigit()}
