"""The metadata store in files, byte for byte Docker's ``layerdb``.

::

    sha256/<chain id's digits>/     diff  size  cache-id  parent  descriptor.json  tar-split.json.gz
    sha256/<digits>-<random>-removing/
    mounts/<name>/                  mount-id  init-id  parent
    tmp/write-set-<random>/         a layer that is being registered
    tmp/adopt-set-<random>/         a layer, read-write or not, that is being made of a tree that was there before
    tmp/mount-set-<random>/         a read-write layer that is being made
    tmp/mount-removing-<random>/    one that is being removed
    lock                            unionfs.host.locks

Files are written without a newline at the end and read with any space around. The names below ``tmp`` mean nothing to
Docker, which never looks there.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import secrets
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, BinaryIO

from isal import isal_zlib

from unionfs.errors import InvalidDigestError, LayerStoreError, MetadataError
from unionfs.host import disk
from unionfs.layers.identity import (
    ALGORITHM,
    INIT_SUFFIX,
    NO_CHAIN,
    ChainID,
    DiffID,
    digits_of,
    extend_chain,
    is_hex_digest,
    is_valid_id,
    parse_digest,
)
from unionfs.layers.metadata import Descriptor, IncompleteTransaction, LayerRecord, MountRecord, Unreadable

_log = logging.getLogger(__name__)

REMOVING = "-removing"
_WRITE_SET = "write-set-"
_ADOPT_SET = "adopt-set-"
_MOUNT_SET = "mount-set-"
_MOUNT_REMOVING = "mount-removing-"
_TAR_SPLIT = "tar-split.json.gz"

# What a directory in ``tmp`` is by its name, and which files in it name trees that go with it.
_IN_TMP = (
    (_ADOPT_SET, (), "an unfinished adoption"),
    (_WRITE_SET, ("cache-id",), "an unfinished registration"),
    (_MOUNT_SET, ("mount-id", "init-id"), "an unfinished read-write layer"),
    (_MOUNT_REMOVING, ("mount-id", "init-id"), "an unfinished removal"),
)

# No file here but the record and the descriptor holds more than a digest.
_MAX_FILE_BYTES = 1 << 20


class FileMetadataStore:
    """A :class:`unionfs.layers.metadata.MetadataStore`.

    Args:
        root: the ``layerdb`` directory; made with mode 0700 where it is missing.
        read_only: every change is refused.

    Raises:
        OSError: the directory cannot be made.
    """

    def __init__(self, root: str, *, read_only: bool = False) -> None:
        self.root = os.path.abspath(root)
        self._layers = os.path.join(self.root, ALGORITHM)
        self._mounts = os.path.join(self.root, "mounts")
        self._tmp = os.path.join(self.root, "tmp")
        self.read_only = read_only
        if not read_only:
            disk.ensure_dir(self.root, 0o700)

    def check_writable(self) -> None:
        """See :meth:`MetadataStore.check_writable`."""
        if self.read_only:
            raise LayerStoreError(f"{self.root}: the store was opened to be read only; open it without read_only")

    # Reading

    def list_layers(self) -> list[ChainID]:
        """See :meth:`MetadataStore.list_layers`."""
        return [ChainID(f"{ALGORITHM}:{name}") for name in _entries(self._layers) if is_hex_digest(name)]

    def list_mounts(self) -> list[str]:
        """See :meth:`MetadataStore.list_mounts`."""
        return _entries(self._mounts)

    def layer(self, chain_id: ChainID) -> LayerRecord:
        """See :meth:`MetadataStore.layer`."""
        where = self._layer_path(chain_id)
        return LayerRecord(
            diff_id=DiffID(_digest(where, "diff")),
            size=_number(where, "size"),
            cache_id=_cache_id(where),
            parent=_parent(where),
            descriptor=_descriptor(where) if _exists(where, "descriptor.json") else None,
        )

    def mount(self, name: str) -> MountRecord:
        """See :meth:`MetadataStore.mount`."""
        where = self._mount_path(name)
        return MountRecord(
            mount_id=_id(where, "mount-id"),
            init_id=_id(where, "init-id") if _exists(where, "init-id") else "",
            parent=_parent(where),
        )

    def strays(self) -> list[Unreadable]:
        """See :meth:`MetadataStore.strays`. Files and directories without a cache-id are nobody's record."""
        found = []
        for name in _entries(self._layers):
            path = os.path.join(self._layers, name)
            if is_hex_digest(name) or name.endswith(REMOVING):
                continue
            reason = f"{path}: is no layer's name; move it out of the store if nobody needs it"
            if trees := _ids_in(path, "cache-id"):
                parent = None
                with suppress(MetadataError):
                    parent = _parent(path)
                found.append(Unreadable("stray", name, path, reason, trees, parent=parent))
            else:
                _log.warning("%s", reason)
        return found

    def unreadable(self, kind: str, name: str, reason: str) -> Unreadable:
        """See :meth:`MetadataStore.unreadable`."""
        where = self._mount_path(name) if kind == "mount" else self._layer_path(ChainID(name))
        parent: ChainID | None = None
        with suppress(MetadataError):
            parent = _parent(where)
        if kind == "mount":
            trees = _trees_of_mount(where)
            if not parent:
                parent = None  # the file may be what is missing
        else:
            trees = _ids_in(where, "cache-id")
            try:
                if parent is not None and extend_chain(parent, DiffID(_digest(where, "diff"))) != name:
                    parent = None  # one of the two files is wrong
            except MetadataError:
                parent = parent or None
        return Unreadable(kind, name, reason.partition(": ")[0], reason, trees, parent=parent)

    def tar_split(self, chain_id: ChainID) -> BinaryIO | None:
        """See :meth:`MetadataStore.tar_split`."""
        try:
            return open(self.tar_split_path(chain_id), "rb")
        except FileNotFoundError:
            return None

    def tar_split_path(self, chain_id: ChainID) -> str:
        """See :meth:`MetadataStore.tar_split_path`."""
        return os.path.join(self._layer_path(chain_id), _TAR_SPLIT)

    # Writing

    def begin(self, cache_id: str, *, adopting: bool = False) -> FileTransaction:
        """See :meth:`MetadataStore.begin`."""
        self.check_writable()
        where = self._new_set(_ADOPT_SET if adopting else _WRITE_SET)
        disk.write_file(os.path.join(where, "cache-id"), cache_id.encode())
        disk.sync_dir(where)
        return FileTransaction(self, where, cache_id)

    def begin_mount(self, name: str, record: MountRecord, *, adopting: bool = False) -> FileMountTransaction:
        """See :meth:`MetadataStore.begin_mount`."""
        self.check_writable()
        target = self._mount_path(name)
        where = self._new_set(_ADOPT_SET if adopting else _MOUNT_SET)
        disk.write_file(os.path.join(where, "mount-id"), record.mount_id.encode())
        if record.init_id:
            disk.write_file(os.path.join(where, "init-id"), record.init_id.encode())
        if record.parent:
            disk.write_file(os.path.join(where, "parent"), record.parent.encode())
        disk.sync_dir(where)
        return FileMountTransaction(self, where, target)

    def remove_layer(self, chain_id: ChainID) -> FileRemoval:
        """See :meth:`MetadataStore.remove_layer`."""
        self.check_writable()
        path = self._layer_path(chain_id)
        trash = f"{path}-{secrets.token_hex(32)}{REMOVING}"
        with suppress(FileNotFoundError):  # somebody deleted it by hand: then it is off the list
            disk.move(path, trash)
        return FileRemoval(path, trash)

    def remove_mount(self, name: str) -> FileRemoval:
        """See :meth:`MetadataStore.remove_mount`."""
        self.check_writable()
        path = self._mount_path(name)
        disk.ensure_dir(self._tmp, 0o755)
        trash = os.path.join(self._tmp, _MOUNT_REMOVING + secrets.token_hex(16))
        with suppress(FileNotFoundError):
            disk.move(path, trash)
        return FileRemoval(path, trash)

    def incomplete(self) -> list[IncompleteTransaction]:
        """See :meth:`MetadataStore.incomplete`."""
        found = []
        for name in _entries(self._tmp):
            for prefix, ids, what in _IN_TMP:
                if name.startswith(prefix):
                    path = os.path.join(self._tmp, name)
                    found.append(IncompleteTransaction(path, _ids_in(path, *ids), what))
        for name in _entries(self._layers):
            if name.endswith(REMOVING):
                path = os.path.join(self._layers, name)
                found.append(IncompleteTransaction(path, _ids_in(path, "cache-id"), "an unfinished removal"))
        return found

    def forget(self, leftover: IncompleteTransaction) -> None:
        """See :meth:`MetadataStore.forget`."""
        self.check_writable()
        disk.delete(leftover.path)

    # For the transactions

    def commit_layer(self, chain_id: ChainID, where: str) -> None:
        """Move the complete directory ``where`` to its place."""
        disk.ensure_dir(self._layers, 0o755)
        self._install(where, self._layer_path(chain_id), lambda: self.remove_layer(chain_id))

    def commit_mount(self, where: str, target: str) -> None:
        """Move the complete directory ``where`` to ``target`` in the mounts."""
        disk.ensure_dir(self._mounts, 0o755)
        self._install(where, target, lambda: self.remove_mount(os.path.basename(target)))

    @staticmethod
    def _install(where: str, target: str, set_aside: Any) -> None:
        disk.sync_dir(where)
        try:
            disk.move(where, target)
        except FileExistsError:
            # The store knows no layer of this name, so what lies there was not readable. What it names is removed
            # at the next start, unless something else needs it.
            _log.warning("%s: is damaged and makes way for a new one", target)
            set_aside()
            disk.move(where, target)

    def spool(self) -> BinaryIO:
        """A file without a name."""
        disk.ensure_dir(self._tmp, 0o755)
        return tempfile.TemporaryFile(dir=self._tmp)

    def _new_set(self, prefix: str) -> str:
        disk.ensure_dir(self._tmp, 0o755)
        where = disk.new_dir(self._tmp, prefix)
        # What is recorded there is worth something only if its directory survives too.
        disk.sync_dir(self._tmp)
        return where

    def _layer_path(self, chain_id: ChainID) -> str:
        return os.path.join(self._layers, digits_of(chain_id))

    def _mount_path(self, name: str) -> str:
        raw = os.fsencode(name)
        if not name or name in (".", "..") or b"/" in raw or b"\0" in raw or len(raw) > 255:
            raise LayerStoreError(
                f"a read-write layer cannot be named {name[:100]!r}; use up to 255 characters without a slash"
            )
        return os.path.join(self._mounts, name)


class FileTransaction:
    """A :class:`unionfs.layers.metadata.Transaction`: a directory that becomes the layer's by a rename."""

    def __init__(self, store: FileMetadataStore, where: str, cache_id: str) -> None:
        self._store = store
        self._cache_id = cache_id
        self.location = where

    def __str__(self) -> str:
        return self.location

    def spool(self) -> BinaryIO:
        """See :meth:`Transaction.spool`."""
        return self._store.spool()

    def tar_split_writer(self) -> FileTarSplitWriter:
        """See :meth:`Transaction.tar_split_writer`."""
        return FileTarSplitWriter(os.path.join(self.location, _TAR_SPLIT))

    def commit(self, chain_id: ChainID, record: LayerRecord) -> None:
        """See :meth:`Transaction.commit`."""
        # It was written at the start, and must be there at any moment in between.
        assert record.cache_id == self._cache_id
        self._write("diff", record.diff_id)
        self._write("size", str(record.size))
        if record.parent:
            self._write("parent", record.parent)
        if record.descriptor is not None and record.descriptor.digest:
            self._write("descriptor.json", _descriptor_json(record.descriptor))
        self._store.commit_layer(chain_id, self.location)

    def cancel(self) -> None:
        """See :meth:`Transaction.cancel`."""
        disk.delete(self.location)

    def _write(self, name: str, text: str) -> None:
        disk.write_file(os.path.join(self.location, name), text.encode())


@dataclass(slots=True)
class FileMountTransaction:
    """A :class:`unionfs.layers.metadata.MountTransaction`."""

    store: FileMetadataStore
    location: str
    target: str

    def commit(self) -> None:
        """See :meth:`MountTransaction.commit`."""
        self.store.commit_mount(self.location, self.target)

    def cancel(self) -> None:
        """See :meth:`MountTransaction.cancel`."""
        disk.delete(self.location)


@dataclass(slots=True)
class FileRemoval:
    """A :class:`unionfs.layers.metadata.Removal`: a directory under another name."""

    path: str
    trash: str

    def finish(self) -> None:
        """See :meth:`Removal.finish`."""
        disk.delete(self.trash)

    def undo(self) -> None:
        """See :meth:`Removal.undo`."""
        with suppress(FileNotFoundError):
            disk.move(self.trash, self.path)


class FileTarSplitWriter:
    """Compresses a record into its file."""

    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        os.fchmod(self._fd, 0o644)
        # ISA-L's level 2 of 3, several times as fast as zlib; a record is a thousandth of its layer.
        self._compressor = isal_zlib.compressobj(level=2, wbits=31)
        self._pending: list[bytes] = []
        self._pending_bytes = 0

    def write(self, data: bytes, /) -> None:
        """See :meth:`TarSplitWriter.write`."""
        self._pending.append(data)
        self._pending_bytes += len(data)
        if self._pending_bytes >= 1 << 18:
            self._flush()

    def close(self) -> None:
        """See :meth:`TarSplitWriter.close`; closing twice is harmless."""
        if self._fd < 0:
            return
        try:
            self._flush()
            self._put(self._compressor.flush())
            os.fsync(self._fd)
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Close the file as it is: the record is not wanted any more."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _flush(self) -> None:
        self._put(self._compressor.compress(b"".join(self._pending)))
        self._pending = []
        self._pending_bytes = 0

    def _put(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(self._fd, view) :]


# Files


def _entries(path: str) -> list[str]:
    """The names in a directory, whatever they are of: what should be a directory and is none must not be overlooked."""
    try:
        return sorted(os.listdir(path))
    except FileNotFoundError:
        return []


def _exists(where: str, name: str) -> bool:
    return os.path.lexists(os.path.join(where, name))


def _read(where: str, name: str) -> str:
    path = os.path.join(where, name)
    try:
        with open(path, "rb") as file:
            contents = file.read(_MAX_FILE_BYTES)
    except OSError as error:
        what = "is missing" if error.errno == errno.ENOENT else f"cannot be read: {error.strerror}"
        raise _wrong(where, name, what) from error
    text = contents.decode("utf-8", "backslashreplace").strip()
    if not text:
        raise _wrong(where, name, "is empty")
    return text


def _digest(where: str, name: str) -> str:
    try:
        return parse_digest(_read(where, name))
    except InvalidDigestError as error:
        raise _wrong(where, name, str(error)) from error


def _parent(where: str) -> ChainID:
    return ChainID(_digest(where, "parent")) if _exists(where, "parent") else NO_CHAIN


def _number(where: str, name: str) -> int:
    text = _read(where, name)
    if not text.isascii() or not text.removeprefix("-").isdigit() or len(text) > 20:
        raise _wrong(where, name, f"{text[:100]!r} is no number")
    return int(text)


def _cache_id(where: str) -> str:
    text = _read(where, "cache-id")
    if "/" in text or "\0" in text or text in (".", ".."):
        raise _wrong(where, "cache-id", f"invalid cache id value {text[:100]!r}")
    return text


def _id(where: str, name: str) -> str:
    text = _read(where, name)
    if not is_valid_id(text):
        raise _wrong(where, name, f"invalid {name.replace('-', ' ')} value {text[:100]!r}")
    return text


def _ids_in(where: str, *names: str) -> tuple[str, ...]:
    """The driver ids in a directory that may be damaged."""
    found = []
    for name in names:
        with suppress(MetadataError):
            found.append(_cache_id(where) if name == "cache-id" else _id(where, name))
    return tuple(found)


def _trees_of_mount(where: str) -> tuple[str, ...]:
    """The trees of a read-write layer that may be damaged: of the ids of the two, one tells the other."""
    for name in ("mount-id", "init-id"):
        for found in _ids_in(where, name):
            mount_id = found.removesuffix(INIT_SUFFIX)
            return mount_id, mount_id + INIT_SUFFIX
    return ()


def _descriptor(where: str) -> Descriptor:
    text = _read(where, "descriptor.json")
    try:
        fields = json.loads(text)
        return Descriptor(
            media_type=str(fields.get("mediaType", "")),
            digest=str(fields.get("digest", "")),
            size=int(fields.get("size", 0)),
            urls=tuple(map(str, fields.get("urls") or ())),
            annotations=dict(fields.get("annotations") or {}),
            platform=fields.get("platform"),
        )
    except (ValueError, RecursionError, TypeError, AttributeError) as error:
        raise _wrong(where, "descriptor.json", f"is no descriptor: {error}") from error


def _descriptor_json(descriptor: Descriptor) -> str:
    fields = {
        "mediaType": descriptor.media_type,
        "size": descriptor.size,
        "digest": descriptor.digest,
        "urls": list(descriptor.urls),
        "annotations": descriptor.annotations,
        "platform": descriptor.platform,
    }
    return json.dumps({key: value for key, value in fields.items() if value}, separators=(",", ":"))


def _wrong(where: str, name: str, what: str) -> MetadataError:
    again = "" if os.path.basename(os.path.dirname(where)) == "mounts" else ", or register the layer again"
    return MetadataError(f"{os.path.join(where, name)}: {what}; run unionfs fsck{again}")
