"""The images of a layer store: configurations, names, and references on layers.

The files are Docker's (``image/DRIVER/`` of its data root), so its images can be read while it is stopped::

    imagedb/content/sha256/<image id>       the configuration, exactly
    imagedb/metadata/sha256/<image id>/     Docker's notes on it; removed with the image
    repositories.json                       the names as people write them, grouped by what stands before the tag:
        {"Repositories": {"alpine": {"alpine:latest": "sha256:<image id>", "alpine@sha256:<manifest>": "sha256:..."}}}
    layerdb/                                the layer store's

Counts of who needs a layer live in the layer store's memory. So whoever removes layers opens the images too: an image
in an open image store holds its layers.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
import threading
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import BinaryIO

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from unionfs.engines.images.model import MAX_CONFIG_BYTES, Image, digest_of, first_problem, parse_image
from unionfs.engines.images.reference import Reference, parse_reference
from unionfs.errors import (
    ImageError,
    ImageInUseError,
    ImageNotFoundError,
    LayerDoesNotExistError,
    MetadataError,
)
from unionfs.host.disk import delete, ensure_dir, replace_file, sync_dir
from unionfs.layers import Layer, LayerHandle, LayerMetadata, LayerStore, Problem, create_chain_id
from unionfs.layers.identity import ALGORITHM, digits_of, is_hex_digest

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Removed:
    """What a removal did.

    Attributes:
        untagged: names that are gone.
        image_id: the image that is gone; ``""`` when it has other names.
        layers: that went with it, top first.
    """

    untagged: tuple[str, ...] = ()
    image_id: str = ""
    layers: tuple[LayerMetadata, ...] = field(default=())


class _File(BaseModel):
    model_config = ConfigDict(extra="ignore")

    repositories: dict[str, dict[str, str]] = Field(default_factory=dict, alias="Repositories")


class ImageNames:
    """Which name stands for which image, in ``repositories.json``. Every change is on disk when the method returns.

    Args:
        path: of the file; it need not be there.

    Attributes:
        damage: what is wrong with the file; empty if nothing is. Then there are no names, and none can be given.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self.damage = ""
        self._ids: dict[Reference, str] = {}
        try:
            with open(path, "rb") as file:
                contents = file.read()
        except FileNotFoundError:
            return
        try:
            found = _File.model_validate_json(contents or b"{}")
        except ValidationError as error:
            self.damage = f"{path}: is damaged ({first_problem(error)})"
            return
        for group in found.repositories.values():
            for text, image_id in group.items():
                try:
                    self._ids[parse_reference(text)] = image_id
                except ImageError as error:
                    _log.warning("%s: %s", path, error)

    def image_id(self, reference: Reference) -> str | None:
        """What the name stands for. With a digest the tag says nothing."""
        if reference.digest:
            reference = Reference(reference.registry, reference.repository, digest=reference.digest)
        return self._ids.get(reference.with_default_tag())

    def of(self, image_id: str) -> tuple[str, ...]:
        """The image's names as people write them, sorted."""
        return tuple(sorted(one.familiar for one, known in self._ids.items() if known == image_id))

    def all(self) -> dict[Reference, str]:
        """All names with the ids of their images."""
        return dict(self._ids)

    def set(self, wanted: dict[Reference, str]) -> None:
        """Let names stand for images, whatever they stood for before. One with tag and digest becomes two."""
        changed = dict(self._ids)
        for reference, image_id in wanted.items():
            if reference.digest:
                changed[Reference(reference.registry, reference.repository, digest=reference.digest)] = image_id
            if reference.tag or not reference.digest:
                named = Reference(reference.registry, reference.repository, reference.tag)
                changed[named.with_default_tag()] = image_id
        self._write(changed)

    def remove(self, references: list[Reference]) -> None:
        """Forget names."""
        gone = set(references)
        self._write({one: image_id for one, image_id in self._ids.items() if one not in gone})

    def _write(self, ids: dict[Reference, str]) -> None:
        if ids == self._ids:
            return
        if self.damage:
            raise MetadataError(f"{self.damage}; move it away, the images can then be named again by id")
        groups: dict[str, dict[str, str]] = {}
        for reference, image_id in ids.items():
            groups.setdefault(reference.familiar_name, {})[reference.familiar] = image_id
        text = json.dumps({"Repositories": groups}, separators=(",", ":"), sort_keys=True)
        replace_file(self._path, os.fsencode(text))
        self._ids = ids


class ImageStore:
    """All images of a layer store, which must stay open as long as this is used.

    Opening it takes a reference on the layers of each image. There is nothing to close: the references end with the
    layer store.

    Args:
        layers: where the layers are.
        root: the directory for the files; None for ``image/DRIVER`` beside the layer store's own.

    Raises:
        OSError: the directory cannot be used. An image that cannot be read is no error: see :attr:`unreadable`.
    """

    def __init__(self, layers: LayerStore, root: str | os.PathLike[str] | None = None) -> None:
        self.layers = layers
        if root is None:
            # Only a store in files can say where it is.
            root = os.path.dirname(layers.records.root)  # type: ignore[attr-defined]
        self.root = os.path.abspath(os.fspath(root))
        self.unreadable: dict[str, str] = {}
        """Images that are stored but cannot be used, with reasons. Adding one again repairs it."""
        self._content = os.path.join(self.root, "imagedb", "content", ALGORITHM)
        self._metadata = os.path.join(self.root, "imagedb", "metadata", ALGORITHM)
        self._lock = threading.RLock()
        self._images: dict[str, Image] = {}
        self._handles: dict[str, LayerHandle] = {}
        looking = layers.records.read_only
        if not looking:
            ensure_dir(self._content, 0o700)
        self._names = ImageNames(os.path.join(self.root, "repositories.json"))
        for name in sorted(os.listdir(self._content)) if os.path.isdir(self._content) else ():
            if is_hex_digest(name):
                self._load(f"{ALGORITHM}:{name}")
            elif name.startswith(".tmp-") and not looking:
                with suppress(OSError):
                    os.unlink(os.path.join(self._content, name))
        if looking:  # another process may have removed images meanwhile, their names first
            self._names = ImageNames(os.path.join(self.root, "repositories.json"))
        for image_id in sorted(set(self._names.all().values()) - self._images.keys() - self.unreadable.keys()):
            self._cannot_read(image_id, "its configuration is gone")

    @property
    def names_damage(self) -> str:
        """What is wrong with the file of names; empty if nothing is."""
        return self._names.damage

    def _load(self, image_id: str) -> None:
        path = os.path.join(self._content, digits_of(image_id))
        try:
            image = _read_image(path, image_id)
        except (ImageError, OSError) as error:
            self._cannot_read(image_id, f"{path}: {error.strerror if isinstance(error, OSError) else error}")
            return
        if image is None:
            self._cannot_read(image_id, f"{path}: is not what it was")
            return
        self._images[image_id] = image
        try:
            self._hold(image)
        except LayerDoesNotExistError as error:
            # The image stays on the list, so that it can be seen, removed, or pulled again.
            _log.info("image %s lacks layers: %s", image_id, error)
            chain = (create_chain_id(image.diff_ids[: number + 1]) for number in range(len(image.diff_ids)))
            self.layers.claims.add_user(_user(image_id), chain)

    def _cannot_read(self, image_id: str, why: str) -> None:
        _log.info("image %s cannot be read: %s; pull or import it again", image_id, why)
        self.unreadable[image_id] = why
        self.layers.claims.add_user(_user(image_id), None)  # nobody knows which layers are its

    def check(self) -> list[Problem]:
        """What is wrong with the images, beside their layers; for ``unionfs fsck``.

        Nothing of it is repaired: without its image, a layer would be of no use to anybody.
        """
        found = []
        with self._lock:
            for image_id, why in sorted(self.unreadable.items()):
                names = self._names.of(image_id)
                found.append((image_id, why + (f" (it was {', '.join(names)})" if names else "")))
            for image_id, image in sorted(self._images.items()):
                if not self.is_complete(image):
                    found.append((image_id, "layers of it are missing"))
        advice = "pull or import it again, or remove it: unionfs image rm"
        problems = [
            Problem("image", image_id, what, f"{advice} {digits_of(image_id)[:12]}") for image_id, what in found
        ]
        if self._names.damage:
            advice = "put it right, or move it away and name the images again: unionfs image tag ID NAME"
            problems.append(Problem("image", "names", self._names.damage, advice))
        return problems

    def _forget(self, image_id: str) -> None:
        """Remove an image's names and files.

        The names first: one that stands for nothing would be in the way of nobody, but an image without a name can
        still be found and removed.
        """
        self._names.remove([name for name, known in self._names.all().items() if known == image_id])
        delete(os.path.join(self._content, digits_of(image_id)))
        sync_dir(self._content)
        delete(os.path.join(self._metadata, digits_of(image_id)))

    def _hold(self, image: Image) -> None:
        if image.chain_id and image.image_id not in self._handles:
            self._handles[image.image_id] = self.layers.get(image.chain_id)

    # Looking

    def all(self) -> list[Image]:
        """All images, by their first name; those without a name come last."""
        with self._lock:
            found = [self._named(image) for image in self._images.values()]
        return sorted(found, key=lambda image: (not image.names, image.names, image.image_id))

    def get(self, text: str) -> Image:
        """The image that ``text`` stands for: a name, an id, or enough of its first digits. A name goes first.

        Raises:
            ImageNotFoundError: there is none.
            ImageError: there are several.
        """
        with self._lock:
            return self._named(self._images[self._find(text)])

    def _find(self, text: str) -> str:
        if text in self._images:
            return text
        named: str | None = None
        with suppress(ImageError):
            named = self._names.image_id(parse_reference(text))
        if named is not None and named in self._images:
            return named
        digits = text.removeprefix(f"{ALGORITHM}:")
        found = [image_id for image_id in self._images if digits and digits_of(image_id).startswith(digits)]
        if len(found) > 1:
            raise ImageError(f"{text} stands for {len(found)} images; give more of its digits")
        if found:
            return found[0]
        if named is not None:
            why = self.unreadable.get(named, "its configuration is gone")
            raise ImageNotFoundError(f"image {text} cannot be used: {why}; pull or import it again")
        raise ImageNotFoundError(
            f"no such image: {text[:200]}; unionfs image ls shows those that are here, unionfs image pull fetches one"
        )

    def is_complete(self, image: Image) -> bool:
        """Whether all layers of the image are there."""
        with self._lock:
            return not image.chain_id or image.image_id in self._handles

    def meant(self, text: str, image: Image) -> list[Reference]:
        """The name with a tag by which ``text`` found the image; none for an id or a digest."""
        reference = self._reference_meant(text, image)
        return [reference] if reference is not None and reference.tag else []

    def is_called(self, text: str, image: Image) -> bool:
        """Whether ``text`` stands for the image now."""
        with self._lock, suppress(ImageError):
            return self._find(text) == image.image_id
        return False

    def layers_of(self, image: Image) -> Sequence[Layer]:
        """The image's layers, the lowest first. They are views, which pin nothing.

        Raises:
            ImageError: they are not all there.
        """
        layer = self.layers.map().get(image.chain_id)
        found: list[Layer] = []
        while layer is not None:
            found.append(layer)
            layer = layer.parent
        if len(found) != len(image.diff_ids):
            raise ImageError(f"layers of image {image.image_id} are missing; pull or import it again")
        return found[::-1]

    def spool(self) -> BinaryIO:
        """A temporary file beside the images, which nobody else sees and which is gone when it is closed."""
        return tempfile.TemporaryFile(dir=None if self.layers.records.read_only else self.root)

    def users(self, image: Image) -> list[str]:
        """The read-write layers that stand on the image, unless another image has the same layers."""
        with self._lock:
            if any(
                other.chain_id == image.chain_id for other in self._images.values() if other.image_id != image.image_id
            ):
                return []
        mounts = self.layers.rw_layers().items()
        return [name for name, mount in mounts if image.chain_id and mount.record.parent == image.chain_id]

    def _named(self, image: Image) -> Image:
        return replace(image, names=self._names.of(image.image_id))

    # Changing

    def add(self, config_bytes: bytes, names: Iterable[Reference] = ()) -> Image:
        """Store an image whose layers are in the layer store. One that is there already gets the names too.

        The caller holds the layers until this returns.

        Args:
            config_bytes: the configuration, which is kept exactly.
            names: they stand for this image from now on, whatever they stood for before.

        Raises:
            ImageFormatError: it is no image's configuration.
            LayerDoesNotExistError: a layer is missing. Nothing is stored.
            OSError: it could not be written. Nothing is stored.
        """
        self.layers.records.check_writable()
        image = parse_image(config_bytes)
        with self._lock:
            path = os.path.join(self._content, digits_of(image.image_id))
            new = image.image_id not in self._images
            if image.chain_id:
                self.layers.reference_count(image.chain_id)  # raises when it is not there
            try:
                if new:
                    replace_file(path, config_bytes)
                self._names.set(dict.fromkeys(names, image.image_id))
            except BaseException:
                if new:
                    with suppress(FileNotFoundError):
                        os.unlink(path)
                raise
            self._images[image.image_id] = image
            self.unreadable.pop(image.image_id, None)
            # Only now: to give a handle back would remove a layer that nobody else holds.
            self._hold(image)
            self.layers.claims.drop_user(_user(image.image_id))
            return self._named(image)

    def tag(self, text: str, name: Reference) -> Image:
        """Give an image one more name; another image that had it loses it.

        Raises:
            ImageNotFoundError: there is no image ``text``.
            ImageError: the name has a digest, which only a registry gives.
        """
        self.layers.records.check_writable()
        if name.digest:
            raise ImageError(f"{name.familiar}: a name with a digest comes from a registry; give a tag")
        with self._lock:
            image_id = self._find(text)
            self._names.set({name: image_id})
            return self._named(self._images[image_id])

    def untag(self, name: Reference) -> None:
        """Take a name away; the image stays.

        Raises:
            ImageNotFoundError: nothing has that name.
        """
        self.layers.records.check_writable()
        with self._lock:
            if self._names.image_id(name) is None:
                raise ImageNotFoundError(f"no such image: {name.familiar}; unionfs image ls shows those that are here")
            self._names.remove([self._key(name)])

    @staticmethod
    def _key(name: Reference) -> Reference:
        if name.digest:
            return Reference(name.registry, name.repository, digest=name.digest)
        return name.with_default_tag()

    def remove(self, text: str, *, force: bool = False) -> Removed:
        """Take a name away, and with the last one the image and those of its layers that nothing else needs.

        An image goes with its last tag: a name with a digest alone does not keep it.

        Args:
            text: a name, or an id: then the image goes, which may have one name.
            force: an id with several names, and an image that containers stand on; their layers stay.

        Raises:
            ImageNotFoundError: there is no such image.
            ImageInUseError: see ``force``.
            DriverError: a layer could not be removed. The image is gone; ``unionfs gc --layers`` removes it later.
        """
        self.layers.records.check_writable()
        with self._lock:
            if (damaged := self._find_unreadable(text)) is not None:
                return self._remove_unreadable(damaged)
            image = self._named(self._images[self._find(text)])
            named = self._reference_meant(text, image)
            all_names = [one for one, image_id in self._names.all().items() if image_id == image.image_id]
            if named is not None:
                gone = [named]
                others = [one for one in all_names if one != named]
                if any(one.tag for one in others) or (others and named.digest):
                    self._names.remove(gone)
                    return Removed((named.familiar,))
            elif not force and sum(1 for one in all_names if one.tag) > 1:
                raise ImageInUseError(
                    f"image {text} has several names ({', '.join(image.names[:5])}); remove them, or use --force"
                )
            users = self.users(image)
            if users and not force:
                raise ImageInUseError(
                    f"image {text} is used by container {users[0]}"
                    f"{f' and {len(users) - 1} more' if len(users) > 1 else ''}; remove that first, or use --force"
                )
            self._forget(image.image_id)
            del self._images[image.image_id]
            self.layers.claims.drop_user(_user(image.image_id))
            handle = self._handles.pop(image.image_id, None)
            layers = self.layers.release(handle) if handle is not None else []
            return Removed(tuple(sorted(one.familiar for one in all_names)), image.image_id, tuple(layers))

    def _find_unreadable(self, text: str) -> str | None:
        """The image that cannot be read and that ``text``, its name or enough of its id, stands for."""
        with suppress(ImageError):
            named = self._names.image_id(parse_reference(text))
            if named is not None:
                return named if named in self.unreadable else None
        digits = text.removeprefix(f"{ALGORITHM}:")
        found = [one for one in (*self.unreadable, *self._images) if digits and digits_of(one).startswith(digits)]
        return found[0] if len(found) == 1 and found[0] in self.unreadable else None

    def _remove_unreadable(self, image_id: str) -> Removed:
        names = [one for one, known in self._names.all().items() if known == image_id]
        self._forget(image_id)
        del self.unreadable[image_id]
        self.layers.claims.drop_user(_user(image_id))
        return Removed(tuple(sorted(one.familiar for one in names)), image_id)

    def _reference_meant(self, text: str, image: Image) -> Reference | None:
        """The name that ``text`` is; None for an id."""
        if text == image.image_id:
            return None
        try:
            reference = parse_reference(text)
        except ImageError:
            return None
        return self._key(reference) if self._names.image_id(reference) == image.image_id else None


def _read_image(path: str, image_id: str) -> Image | None:
    """The image in a file of the store; None if the file is damaged.

    Raises:
        ImageError: it is what it was, and no image for us.
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        contents = file.read(MAX_CONFIG_BYTES + 1)
    return parse_image(contents) if digest_of(contents) == image_id else None


def _user(image_id: str) -> str:
    """What an image is called among those who need layers."""
    return f"image {digits_of(image_id)[:12]}"
