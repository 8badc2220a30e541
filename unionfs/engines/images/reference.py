"""Names of images: ``alpine``, ``ghcr.io/owner/app:v1``, ``alpine@sha256:...``, and what they stand for.

The grammar and the short forms are those of ``distribution/reference``, which Docker, Podman and containerd share:
a name without a registry is one of ``docker.io``, and one of a single part is in its ``library``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from unionfs.errors import ImageError
from unionfs.layers.identity import ALGORITHM, is_hex_digest

DEFAULT_REGISTRY = "docker.io"
DEFAULT_TAG = "latest"

_OLD_DEFAULT_REGISTRY = "index.docker.io"
_LIBRARY = "library/"
_MAX_NAME_LENGTH = 255

_DOMAIN_PART = r"(?:[a-zA-Z0-9]|[a-zA-Z0-9][a-zA-Z0-9-]*[a-zA-Z0-9])"
_REGISTRY = re.compile(rf"(?:{_DOMAIN_PART}(?:\.{_DOMAIN_PART})*|\[[a-fA-F0-9:]+\])(?::[0-9]+)?")
_PATH_PART = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_REPOSITORY = re.compile(rf"{_PATH_PART}(?:/{_PATH_PART})*")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")


@dataclass(frozen=True, slots=True, order=True)
class Reference:
    """An image's name in full.

    Attributes:
        registry: host, with a port if it has one, such as ``docker.io``.
        repository: the path there, such as ``library/alpine``.
        tag: ``""`` for none.
        digest: of the manifest, ``sha256:`` and 64 digits; ``""`` for none.
    """

    registry: str
    repository: str
    tag: str = ""
    digest: str = ""

    @property
    def name(self) -> str:
        """Registry and repository, in full."""
        return f"{self.registry}/{self.repository}"

    @property
    def familiar_name(self) -> str:
        """Registry and repository as people write them: without what goes without saying."""
        if self.registry != DEFAULT_REGISTRY:
            return self.name
        short = self.repository.removeprefix(_LIBRARY)
        return short if "/" not in short else self.repository

    @property
    def familiar(self) -> str:
        """The whole as people write it."""
        return self.familiar_name + self._suffix()

    def __str__(self) -> str:
        return self.name + self._suffix()

    def _suffix(self) -> str:
        return (f":{self.tag}" if self.tag else "") + (f"@{self.digest}" if self.digest else "")

    def with_default_tag(self) -> Reference:
        """The same, with the tag ``latest`` if it has neither a tag nor a digest."""
        return self if self.tag or self.digest else replace(self, tag=DEFAULT_TAG)


def parse_reference(text: str) -> Reference:
    """What ``text`` stands for.

    Args:
        text: such as ``alpine``, ``localhost:5000/app:v1``, ``quay.io/a/b@sha256:...``.

    Raises:
        ImageError: it is no name of an image.
    """
    rest, at, digest = text.partition("@")
    if at and not (digest.startswith(f"{ALGORITHM}:") and is_hex_digest(digest.removeprefix(f"{ALGORITHM}:"))):
        raise _bad(text, "what follows @ must be sha256: and 64 lower-case hexadecimal digits")
    tag = ""
    # A colon in front of the last slash is that of a port.
    head, colon, candidate = rest.rpartition(":")
    if colon and "/" not in candidate:
        rest, tag = head, candidate
        if not _TAG.fullmatch(tag):
            raise _bad(text, f"{tag[:50]!r} is no tag; use at most 128 letters, digits, dots, dashes and underscores")
    registry, repository = _split_registry(rest)
    if not _REGISTRY.fullmatch(registry):
        raise _bad(text, f"{registry[:100]!r} is no host name")
    if not _REPOSITORY.fullmatch(repository):
        why = "use lower case" if _REPOSITORY.fullmatch(repository.lower()) else "write [HOST/]NAME[:TAG]"
        raise _bad(text, why)
    if len(registry) + 1 + len(repository) > _MAX_NAME_LENGTH:
        raise _bad(text, f"it has more than {_MAX_NAME_LENGTH} characters")
    if is_hex_digest(rest):
        raise _bad(text, "64 hexadecimal digits are an image's id")
    return Reference(registry, repository, tag, digest)


def _split_registry(name: str) -> tuple[str, str]:
    first, slash, rest = name.partition("/")
    if not slash or not (any(c in first for c in ".:") or first == "localhost" or first.lower() != first):
        first, rest = DEFAULT_REGISTRY, name
    if first == _OLD_DEFAULT_REGISTRY:
        first = DEFAULT_REGISTRY
    if first == DEFAULT_REGISTRY and "/" not in rest:
        rest = _LIBRARY + rest
    return first, rest


def _bad(text: str, why: str) -> ImageError:
    return ImageError(f"{text[:100]!r} is no name of an image: {why}")
