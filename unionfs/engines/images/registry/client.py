"""What can be asked of a registry about one repository: its manifests and its blobs."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import suppress
from types import TracebackType
from typing import BinaryIO

import httpx

from unionfs.engines.images.manifest import MANIFEST_TYPES, MAX_MANIFEST_BYTES
from unionfs.engines.images.registry.connection import Access, Connection, is_encoded, read_limited
from unionfs.engines.images.registry.download import download
from unionfs.engines.images.registry.retry import TryAgainError
from unionfs.engines.images.registry.upload import upload
from unionfs.errors import DigestMismatchError, ImageNotFoundError, RegistryError
from unionfs.layers.identity import ALGORITHM

Progress = Callable[[int], None]


# Of a manifest: not of who gives it, nor of what is too large.
_REFUSED_AS_IT_IS = frozenset(range(400, 500)) - {401, 403, 413}


class ManifestRefusedError(RegistryError):
    """A manifest that a registry refuses as it is."""


class RegistryClient:
    """A repository in a registry; an async context manager.

    Methods raise :class:`RegistryError` when the registry refuses, gives a wrong answer, or cannot be reached after
    several attempts.

    Args:
        registry, repository: as in an image's name.
        access: see :class:`Access`.
        actions: ``pull``, or ``pull,push``.
        also_from: other repositories that blobs are taken from.
    """

    def __init__(
        self, registry: str, repository: str, access: Access, actions: str = "pull", also_from: Iterable[str] = ()
    ) -> None:
        self.registry = registry
        self._connection = Connection(registry, repository, access, actions, also_from)

    async def __aenter__(self) -> RegistryClient:
        await self._connection.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._connection.__aexit__(kind, error, trace)

    async def manifest(self, reference: str) -> tuple[bytes, str]:
        """A manifest, and what the registry says it is.

        Args:
            reference: a tag, or a digest, which the manifest is checked to have.

        Raises:
            ImageNotFoundError: there is none.
            DigestMismatchError: it has another digest.
        """
        headers = {"Accept": ", ".join(MANIFEST_TYPES)}

        async def get() -> tuple[bytes, str]:
            async with self._connection.request(
                "GET", self._connection.url("manifests", reference), headers
            ) as response:
                if response.status_code == 404:
                    raise ImageNotFoundError(
                        f"{self.registry} has no {self._connection.repository}:{reference}; check the name and the tag"
                    )
                if response.status_code != 200:
                    raise await self._connection.refusal(response)
                contents = await read_limited(response, MAX_MANIFEST_BYTES)
                return contents, response.headers.get("Content-Type", "")

        contents, media_type = await self._connection.keep_trying(get)
        if reference.startswith(f"{ALGORITHM}:"):
            _compare(hashlib.sha256(contents).hexdigest(), reference, "the manifest")
        return contents, media_type

    async def put_manifest(self, reference: str, contents: bytes, media_type: str) -> None:
        """Store a manifest, whose blobs are there, under a tag or its digest.

        Raises:
            ManifestRefusedError: the registry does not take it; perhaps it takes another kind.
        """
        digest = f"{ALGORITHM}:{hashlib.sha256(contents).hexdigest()}"

        async def put() -> None:
            url = self._connection.url("manifests", reference)
            # With its length: registries and what stands before them refuse a manifest of unknown length.
            headers = {"Content-Type": media_type, "Content-Length": str(len(contents))}
            async with self._connection.request("PUT", url, headers, lambda: _all(contents)) as response:
                if response.status_code not in (200, 201, 202):
                    refusal = await self._connection.refusal(response)
                    if response.status_code in _REFUSED_AS_IT_IS:
                        raise ManifestRefusedError(str(refusal))
                    raise refusal
                stored = response.headers.get("Docker-Content-Digest", digest)
                if stored != digest:
                    raise RegistryError(f"{self.registry} stored the manifest as {stored[:100]}, but it is {digest}")

        await self._connection.keep_trying(put)

    async def small_blob(self, digest: str, size: int, limit: int) -> bytes:
        """All of a blob of at most ``limit`` bytes, checked."""
        if size > limit:
            raise RegistryError(f"blob {digest} of {self.registry} has {size} bytes, where {limit} are the most")

        async def get() -> bytes:
            async with self._connection.request("GET", self._connection.url("blobs", digest)) as response:
                if response.status_code != 200:
                    raise await self._connection.refusal(response, digest)
                return await read_limited(response, size)

        contents = await self._connection.keep_trying(get)
        _compare(hashlib.sha256(contents).hexdigest(), digest, "a blob")
        return contents

    async def download(self, digest: str, size: int, file: BinaryIO, progress: Progress) -> None:
        """Write a blob to an empty file, checked. What was cut off goes on where it ended.

        Args:
            digest, size: of it.
            file: open for writing.
            progress: called with the number of bytes that are there.

        Raises:
            DigestMismatchError: it is another one, from the second download too.
        """
        await download(self._connection, digest, size, file, progress)

    async def blob_size(self, digest: str) -> int | None:
        """The size in bytes of a blob that the repository has; None if it has not, or does not tell."""

        async def head() -> int | None:
            async with self._connection.request("HEAD", self._connection.url("blobs", digest)) as response:
                if response.status_code == 404:
                    return None
                if response.status_code != 200:
                    raise await self._connection.refusal(response)
                length = "" if is_encoded(response) else response.headers.get("Content-Length", "")
                return int(length) if length.isdecimal() else None

        return await self._connection.keep_trying(head)

    async def mount(self, digest: str, other: str) -> bool:
        """Take a blob over from another repository of the registry; False if that does not work."""

        async def post() -> bool:
            url = self._connection.url("blobs", "uploads/").copy_merge_params({"mount": digest, "from": other})
            async with self._connection.request("POST", url) as response:
                if response.status_code == 201:
                    return True
                if response.status_code == 202:
                    # It does not have the blob there, and begins an upload instead, which nobody needs.
                    location = self._connection.location(response)
                    with suppress(TryAgainError, httpx.HTTPError):
                        async with self._connection.request("DELETE", location):
                            pass
                return False

        return await self._connection.keep_trying(post)

    async def upload(self, digest: str, size: int, file: BinaryIO, progress: Progress) -> None:
        """Store a blob.

        Args:
            digest, size: of it.
            file: with all of it.
            progress: called with the number of bytes sent so far.
        """
        await upload(self._connection, digest, size, file, progress)


async def _all(contents: bytes) -> AsyncIterator[bytes]:
    yield contents


def _compare(digits: str, expected: str, what: str) -> None:
    found = f"{ALGORITHM}:{digits}"
    if found != expected:
        raise DigestMismatchError(f"{what} from the registry is {found}, but {expected} was expected; try again later")
