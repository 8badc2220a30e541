"""Importing images from what is on disk: recognises which kind of archive or directory it is."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import BinaryIO

from unionfs.engines.images.docker_archive import MANIFEST, read_docker_archive
from unionfs.engines.images.install import FoundImage, Report, install, no_report
from unionfs.engines.images.model import Image, Platform, parse_image
from unionfs.engines.images.oci_layout import INDEX, DirectoryFiles, read_layout
from unionfs.engines.images.reference import Reference, parse_reference
from unionfs.engines.images.store import ImageStore
from unionfs.engines.images.tar_files import TarFiles, plain_file
from unionfs.errors import ArchiveError, ImageError, ImageFormatError


def import_images(
    images: ImageStore,
    source: str | os.PathLike[str] | BinaryIO,
    *,
    platform: Platform | None = None,
    only: str = "",
    names: Sequence[Reference] | None = None,
    report: Report = no_report,
) -> list[Image]:
    """Store the images of an archive or a directory.

    Args:
        images: where they go.
        source: an archive of ``docker save`` or of an OCI layout, compressed or not, as a path or a stream; or the
            directory of an OCI layout.
        platform: which one where there are several; None: this machine's.
        only: the image of this name, tag or id, when there are several.
        names: instead of those in the source, for its only image.
        report: see :class:`unionfs.engines.images.install.Report`.

    Raises:
        ImageFormatError: it is no such thing, incomplete, or contradicts itself.
        DigestMismatchError: a blob or a layer is not what it should be.
        ArchiveError: an archive is damaged.
        OSError: it cannot be read.
    """
    with _found(images, source, platform, only) as found:
        if names and len(found) > 1:
            raise ImageError(f"there are {len(found)} images in it, and one name; say which one is meant")
        return [install(images, one, names or None, report) for one in found]


@contextmanager
def _found(
    images: ImageStore, source: str | os.PathLike[str] | BinaryIO, platform: Platform | None, only: str
) -> Iterator[list[FoundImage]]:
    with ExitStack() as stack:
        if isinstance(source, str | os.PathLike):
            path = os.fspath(source)
            if os.path.isdir(path):
                if not os.path.exists(os.path.join(path, INDEX)):
                    raise ImageFormatError(f"{path}: has no {INDEX}, so it is no OCI layout; name one, or an archive")
                yield read_layout(DirectoryFiles(path), platform, only)
                return
            source = stack.enter_context(open(path, "rb"))
        plain = plain_file(source, images.spool)
        if plain is not source:
            stack.enter_context(plain)
        try:
            files = TarFiles(plain)
        except ArchiveError as error:
            raise ImageFormatError(f"not an archive of images: {error}") from error
        yield _in_archive(files, platform, only)


def _in_archive(files: TarFiles, platform: Platform | None, only: str) -> list[FoundImage]:
    if MANIFEST in files:
        try:
            return _wanted(read_docker_archive(files), platform, only)
        except _OtherPlatformError:
            # docker save writes there only the best of an image's platforms for its own machine.
            if INDEX not in files:
                raise
    if INDEX in files:
        return read_layout(files, platform, only)
    raise ImageFormatError(f"the archive has no {MANIFEST} and no {INDEX}, so it is none of images")


class _OtherPlatformError(ImageFormatError):
    """An image for another machine than the one that was asked for."""


def _wanted(found: list[FoundImage], platform: Platform | None, only: str) -> list[FoundImage]:
    """Those of a Docker archive that are meant; of several with the same names, which are for several machines, one."""
    images = [(one, parse_image(one.config_bytes)) for one in found]
    if only:
        digits = only.removeprefix("sha256:")
        images = [(one, image) for one, image in images if _has_name(one, only) or image.image_id[7:] == digits]
        if not images:
            raise ImageFormatError(f"there is no image {only[:100]!r} in the archive")
    groups: dict[object, list[tuple[FoundImage, Image]]] = {}
    for number, (one, image) in enumerate(images):
        groups.setdefault(one.names or number, []).append((one, image))
    chosen = []
    for group in groups.values():
        ranks = [(platform or Platform.of_this_machine()).rank(image.platform) for _, image in group]
        fitting = [(rank, number) for number, rank in enumerate(ranks) if rank is not None]
        if platform is not None and not fitting:
            raise _OtherPlatformError(f"the image is for {group[0][1].platform}, not for {platform}")
        chosen.append(group[min(fitting)[1] if fitting else 0][0])
    return chosen


def _has_name(found: FoundImage, text: str) -> bool:
    try:
        return parse_reference(text).with_default_tag() in found.names
    except ImageError:
        return False
