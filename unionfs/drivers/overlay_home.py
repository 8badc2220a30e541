"""The home of the layered drivers, laid out as Docker's ``overlay2`` does, byte for byte.

::

    home/                   0710
      l/                    0700; l/<26 characters> -> ../<id>/diff, so that long stacks fit into one page of options
      <id>/                 0710
        diff/               the layer's own changes, whiteouts as overlayfs makes them
        link                the 26 characters
        lower               "l/AAA...:l/BBB...": the parents, nearest first; not for a base layer
        work/               0700; only with a parent
        merged/             0700; only while mounted
        committed           empty; made when the layer gets a child: it is mounted read-only from then on

Beyond that layout: directories under construction and under removal have names of their own (:mod:`.home`) and are
swept at start-up, when lost or dangling links are put right too. Everything that ``l/`` says can be made again from the
``link`` files.
"""

from __future__ import annotations

import base64
import contextlib
import logging
import os
import re
import secrets
import stat
from collections.abc import Callable
from dataclasses import dataclass

from unionfs.archive.idmapping import IdMapping
from unionfs.drivers import home
from unionfs.drivers.contract import check_layer_id, is_layer_id
from unionfs.errors import DriverError, LayerBusyError, LayerNotFoundError
from unionfs.host import disk

_log = logging.getLogger(__name__)

LINK_DIR = "l"
LINK_LENGTH = 26
DEFAULT_MAX_DEPTH = 128  # moby's: 128 short links fit into one page of mount options

_LINK = re.compile(r"[A-Za-z0-9]+\Z", re.ASCII)


@dataclass(frozen=True, slots=True)
class LayerPaths:
    """Where the parts of one layer are, as absolute paths."""

    base: str

    @property
    def diff(self) -> str:
        """The layer's own changes: the upper directory."""
        return self.base + "/diff"

    @property
    def work(self) -> str:
        """The work directory."""
        return self.base + "/work"

    @property
    def merged(self) -> str:
        """The mount point."""
        return self.base + "/merged"

    @property
    def link(self) -> str:
        """The file with the short name."""
        return self.base + "/link"

    @property
    def lower(self) -> str:
        """The file with the parents."""
        return self.base + "/lower"

    @property
    def committed(self) -> str:
        """The marker of a layer that is somebody's parent."""
        return self.base + "/committed"


class OverlayHome:
    """The layers in one home. Its callers see to it that no two of them change one layer at a time.

    Args:
        root: the home; made if it does not exist.
        id_mapping: whose root owns the layers' directories.
        max_depth: how many parents a layer may have.

    Raises:
        DriverError: the directories cannot be made.
    """

    def __init__(self, root: str, id_mapping: IdMapping, max_depth: int = DEFAULT_MAX_DEPTH) -> None:
        self.owner = home.root_owner(id_mapping)
        self._max_depth = max_depth
        home.ensure_dir(os.path.abspath(root), 0o710, (os.geteuid(), self.owner[1]))
        # Without links, as the mount table will show it.
        self.root = os.path.realpath(root)
        home.ensure_dir(os.path.join(self.root, LINK_DIR), 0o700, self.owner)

    def paths(self, layer_id: str) -> LayerPaths:
        """The parts of the layer ``layer_id``, existing or not."""
        return LayerPaths(f"{self.root}/{layer_id}")

    def exists(self, layer_id: str) -> bool:
        """Whether there is a layer of this id."""
        return is_layer_id(layer_id) and os.path.isdir(self.paths(layer_id).base)

    def existing(self, layer_id: str, doing: str) -> LayerPaths:
        """The parts of a layer; raises :class:`LayerNotFoundError` if there is none, ``doing`` being the verb."""
        check_layer_id(layer_id, doing)
        paths = self.paths(layer_id)
        if not os.path.isdir(paths.base):
            raise LayerNotFoundError(f"cannot {doing} layer {layer_id}: {paths.base} does not exist; check the id")
        return paths

    def layer_ids(self) -> list[str]:
        """The ids of all layers, sorted."""
        with os.scandir(self.root) as entries:
            return sorted(
                entry.name for entry in entries if is_layer_id(entry.name) and entry.is_dir(follow_symlinks=False)
            )

    # Parents

    def lower_links(self, layer_id: str) -> list[str]:
        """The parents as ``l/NAME``, nearest first; none for a base layer.

        Raises:
            DriverError: the file is damaged, as a loss of power could leave it in homes of older programs.
        """
        path = self.paths(layer_id).lower
        try:
            with open(path, encoding="ascii", errors="replace") as file:
                text = file.read().strip()
        except FileNotFoundError:
            return []
        links = text.split(":")
        for link in links:
            directory, _, name = link.partition("/")
            if directory != LINK_DIR or not _LINK.match(name):
                raise DriverError(
                    f"{path}: {text[:80]!r} is not a list of parents; remove layer {layer_id}, it is damaged"
                )
        return links

    def has_parent(self, layer_id: str) -> bool:
        """Whether the layer was made over another one, and so needs a mount."""
        return os.path.exists(self.paths(layer_id).lower)

    def lower_dirs(self, layer_id: str) -> list[str]:
        """The parents' ``diff`` directories by their short names, as absolute paths, nearest first."""
        return [f"{self.root}/{link}" for link in self.lower_links(layer_id)]

    def lower_ids(self, layer_id: str) -> list[str]:
        """The parents' ids, nearest first.

        Raises:
            DriverError: a link is missing or leads elsewhere.
        """
        return [self._target_id(link, layer_id) for link in self.lower_links(layer_id)]

    def is_parent(self, layer_id: str, parent: str) -> bool:
        """Whether ``parent`` is what the layer was made over; ``""`` for a base layer."""
        links = self.lower_links(layer_id)
        if not links or not parent:
            return not links and not parent
        return self._target_id(links[0], layer_id) == parent

    def children(self, layer_id: str) -> list[str]:
        """The ids of the layers that have this one among their parents, sorted."""
        names = self._links_to(layer_id)
        found = []
        # The mark "committed" is not asked: homes of older programs have none, and it can be lost.
        for other in self.layer_ids():
            try:
                with open(self.paths(other).lower, encoding="ascii", errors="replace") as file:
                    if not names.isdisjoint(file.read().strip().split(":")):
                        found.append(other)
            except OSError:
                continue
        return found

    def _links_to(self, layer_id: str) -> set[str]:
        """The short names of a layer, of which one should be: the one it has, and those that lead to it."""
        names = set()
        with contextlib.suppress(DriverError):
            names.add(f"{LINK_DIR}/{self.link_name(layer_id)}")
        target = f"../{layer_id}/diff"
        for name in os.listdir(f"{self.root}/{LINK_DIR}"):
            with contextlib.suppress(OSError):
                if os.readlink(f"{self.root}/{LINK_DIR}/{name}") == target:
                    names.add(f"{LINK_DIR}/{name}")
        return names

    def is_committed(self, layer_id: str) -> bool:
        """Whether the layer is somebody's parent, or was."""
        return os.path.exists(self.paths(layer_id).committed)

    def link_name(self, layer_id: str) -> str:
        """The layer's short name.

        Raises:
            DriverError: the file is missing or damaged.
        """
        path = self.paths(layer_id).link
        try:
            with open(path, encoding="ascii", errors="replace") as file:
                name = file.read().strip()
        except OSError as error:
            raise DriverError(f"{path}: {error.strerror}; remove layer {layer_id}, it is damaged") from error
        if not _LINK.match(name):
            raise DriverError(f"{path}: {name[:80]!r} is not a link name; remove layer {layer_id}, it is damaged")
        return name

    def _target_id(self, link: str, layer_id: str) -> str:
        try:
            target = os.readlink(f"{self.root}/{link}")
        except OSError as error:
            raise DriverError(
                f"{self.root}/{link}: {error.strerror}, but layer {layer_id} has it as parent; open the driver again, "
                "which restores lost links, or remove that layer"
            ) from error
        return os.path.basename(os.path.dirname(target))

    # Making and removing

    def create(self, layer_id: str, parent: str, prepare: Callable[[str], None]) -> LayerPaths:
        """Make the directories and files of a new layer. The parent is marked as committed.

        Args:
            layer_id: the new layer.
            parent: what it is made over; ``""`` for a base layer.
            prepare: called with its directory when that is still empty; what is made in it later may inherit from it.

        Raises:
            LayerExistsError: the id is taken.
            LayerNotFoundError: there is no such parent.
            DriverError: there would be too many parents.
        """
        check_layer_id(layer_id, "create")
        lower = self._lower_of_child(parent) if parent else []
        link = new_link_name()
        link_path = f"{self.root}/{LINK_DIR}/{link}"
        try:
            with home.new_dir(self.root, layer_id, 0o710, (os.geteuid(), self.owner[1])) as path:
                building = LayerPaths(path)
                prepare(path)
                home.make_dir(building.diff, 0o755, self.owner)
                os.symlink(f"../{layer_id}/diff", link_path)
                if parent:
                    _copy_root(self.paths(parent).diff, building.diff)
                    home.make_dir(building.work, 0o700, self.owner)
                    disk.write_file(building.lower, ":".join(lower).encode())
                disk.write_file(building.link, link.encode())
                disk.sync_dir(path)
                if parent:
                    self._mark_committed(parent)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(link_path)
            raise
        return self.paths(layer_id)

    def set_aside(self, layer_id: str) -> str:
        """Take the layer out of the home; what it returns is to be deleted (:func:`unionfs.drivers.home.delete`)."""
        link = None
        if self.exists(layer_id):
            try:
                link = self.link_name(layer_id)
            except DriverError as error:
                _log.warning("%s", error)  # the link it may have had dangles, and is swept at the next start
        trash = home.set_aside(self.root, layer_id)
        if link is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(f"{self.root}/{LINK_DIR}/{link}")
        return trash

    def check_childless(self, layer_id: str, doing: str) -> None:
        """Raise :class:`LayerBusyError` when the layer is a parent; ``doing`` is the verb."""
        children = self.children(layer_id)
        if children:
            more = f" and {len(children) - 3} more" if len(children) > 3 else ""
            raise LayerBusyError(
                f"cannot {doing} layer {layer_id}: it is the parent of {', '.join(children[:3])}{more}; "
                "remove these first"
            )

    def _lower_of_child(self, parent: str) -> list[str]:
        self.existing(parent, "create a layer on")
        lower = [f"{LINK_DIR}/{self.link_name(parent)}", *self.lower_links(parent)]
        if len(lower) > self._max_depth:
            raise DriverError(
                f"max depth exceeded: {parent} has {len(lower) - 1} parents already, the most is {self._max_depth}; "
                "squash the image's layers"
            )
        return lower

    def _mark_committed(self, layer_id: str) -> None:
        with contextlib.suppress(FileExistsError):
            os.close(os.open(self.paths(layer_id).committed, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))

    # Start-up

    def recover(self) -> None:
        """Delete what unfinished calls left, and make the links what the ``link`` files say."""
        home.sweep(self.root)
        links_dir = f"{self.root}/{LINK_DIR}"
        wanted = {}
        for layer_id in self.layer_ids():
            try:
                wanted[self.link_name(layer_id)] = f"../{layer_id}/diff"
            except DriverError as error:
                _log.warning("%s", error)
        for name in os.listdir(links_dir):
            path = f"{links_dir}/{name}"
            target = wanted.pop(name, None)
            if not stat.S_ISLNK(os.lstat(path).st_mode):
                continue  # not made by a driver
            if target is None and not os.path.exists(path):
                _log.info("removing the link %s, whose layer is gone", path)
                os.unlink(path)
            elif target is not None and os.readlink(path) != target:
                os.unlink(path)
                os.symlink(target, path)
        for name, target in wanted.items():
            _log.warning("restoring the lost link %s/%s to %s", links_dir, name, target)
            os.symlink(target, f"{links_dir}/{name}")


def new_link_name() -> str:
    """26 random characters of the base32 alphabet."""
    return base64.b32encode(secrets.token_bytes((LINK_LENGTH * 5 + 7) // 8)).decode()[:LINK_LENGTH]


def _copy_root(parent_diff: str, diff: str) -> None:
    """The root of a merged tree has the attributes of its top layer's, so these are handed down."""
    info = os.stat(parent_diff)
    os.chown(diff, info.st_uid, info.st_gid)
    os.chmod(diff, stat.S_IMODE(info.st_mode))
