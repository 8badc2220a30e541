"""What can be asked of a registry about one repository: its manifests, and its blobs in both directions.

A blob that was cut off goes on where it ended, and a large one is sent in pieces of which none is sent twice without
need. Source: OCI distribution specification.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import suppress
from types import TracebackType
from typing import BinaryIO

import httpx

from unionfs.engines.images.manifest import MANIFEST_TYPES, MAX_MANIFEST_BYTES
from unionfs.engines.images.registry.connection import (
    Access,
    Connection,
    Content,
    TryAgainError,
    is_encoded,
    read_limited,
)
from unionfs.engines.images.tar_files import Region
from unionfs.errors import DigestMismatchError, ImageNotFoundError, RegistryError
from unionfs.layers.identity import ALGORITHM

_CONTENT_RANGE = re.compile(r"bytes (\d+)-\d+/(?:\d+|\*)")
_PIECE_BYTES = 1 << 18
_BLOB_TYPE = {"Content-Type": "application/octet-stream"}

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

        contents, media_type = await self._connection.retry(get)
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

        await self._connection.retry(put)

    async def small_blob(self, digest: str, size: int, limit: int) -> bytes:
        """All of a blob of at most ``limit`` bytes, checked."""
        if size > limit:
            raise RegistryError(f"blob {digest} of {self.registry} has {size} bytes, where {limit} are the most")

        async def get() -> bytes:
            async with self._connection.request("GET", self._connection.url("blobs", digest)) as response:
                if response.status_code != 200:
                    raise await self._connection.refusal(response, digest)
                return await read_limited(response, size)

        contents = await self._connection.retry(get)
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
        # Once more from the start: something on the way may have kept a wrong copy, or put two together.
        for _ in range(2):
            state = _Download(self._connection, digest, size, file, progress)
            await self._connection.retry(state.go_on, lambda state=state: state.done)  # type: ignore[misc]
            if state.found == digest:
                file.flush()
                return
        raise _mismatch("a blob", state.found, digest)

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

        return await self._connection.retry(head)

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

        return await self._connection.retry(post)

    async def upload(self, digest: str, size: int, file: BinaryIO, progress: Progress) -> None:
        """Store a blob.

        Args:
            digest, size: of it.
            file: with all of it.
            progress: called with the number of bytes sent so far.
        """
        one = _Upload(self._connection, digest, size, file, progress)
        if size <= self._connection.access.upload_bytes:
            await self._connection.retry(one.whole)
        else:
            await self._connection.retry(one.pieces, lambda: one.done)


async def _all(contents: bytes) -> AsyncIterator[bytes]:
    yield contents


def _compare(digits: str, expected: str, what: str) -> None:
    found = f"{ALGORITHM}:{digits}"
    if found != expected:
        raise _mismatch(what, found, expected)


def _mismatch(what: str, found: str, expected: str) -> DigestMismatchError:
    return DigestMismatchError(f"{what} from the registry is {found}, but {expected} was expected; try again later")


class _Download:
    """One blob on its way down.

    Attributes:
        done: bytes that are in the file.
    """

    def __init__(self, connection: Connection, digest: str, size: int, file: BinaryIO, progress: Progress) -> None:
        self._connection = connection
        self._digest = digest
        self._size = size
        self._file = file
        self._progress = progress
        self._in_parts = True
        self._start_again()

    @property
    def found(self) -> str:
        """The digest of what is in the file."""
        return f"{ALGORITHM}:{self._hash.hexdigest()}"

    def _start_again(self) -> None:
        self.done = 0
        self._hash = hashlib.sha256()
        self._file.seek(0)
        self._file.truncate()

    def _write(self, piece: bytes) -> None:
        self.done += len(piece)
        if self.done > self._size:
            raise RegistryError(f"the registry gives more than the {self._size} bytes that it promised for a blob")
        self._hash.update(piece)
        self._file.write(piece)
        self._progress(self.done)

    async def go_on(self) -> None:
        """Get what is still missing."""
        if self._size and self.done == self._size:
            return
        headers = {"Range": f"bytes={self.done}-"} if self.done and self._in_parts else {}
        async with self._connection.request("GET", self._connection.url("blobs", self._digest), headers) as response:
            if response.status_code == 416 or (
                response.status_code == 206 and not _starts_at(response.headers.get("Content-Range", ""), self.done)
            ):
                self._start_again()
                raise TryAgainError("the registry gave another part of a blob than it was asked for")
            if response.status_code == 200:
                self._start_again()  # it does not know about parts
            elif response.status_code != 206:
                raise await self._connection.refusal(response, self._digest)
            # As they come: pieces of one size would be kept back until they are full, and lost with the connection.
            pieces = response.aiter_raw()
            if is_encoded(response) and response.headers.get("Content-Length") != str(self._size - self.done):
                # Otherwise it is the blob itself, which some storage calls an encoding because it is a gzip file.
                pieces = response.aiter_bytes()
                self._in_parts = False
                if self.done:
                    raise TryAgainError("a part of a blob was compressed on the way")
            async for piece in pieces:
                self._write(piece)
        if self.done < self._size:
            raise TryAgainError(f"a blob ended after {self.done} of {self._size} bytes")


def _starts_at(content_range: str, offset: int) -> bool:
    found = _CONTENT_RANGE.fullmatch(content_range.strip())
    return found is not None and int(found[1]) == offset


class _Upload:
    """One blob on its way up.

    Attributes:
        done: bytes that the registry has.
    """

    def __init__(self, connection: Connection, digest: str, size: int, file: BinaryIO, progress: Progress) -> None:
        self._connection = connection
        self._digest = digest
        self._size = size
        self._file = file
        self._progress = progress
        self.done = 0
        self._location: httpx.URL | None = None
        self._uncertain = False

    async def whole(self) -> None:
        """All at once."""
        await self._finish(await self._begin(), lambda: self._part(0, self._size), self._size)

    async def pieces(self) -> None:
        """Piece by piece; called again after a failure, it goes on where the registry says."""
        if self._location is None:
            self._location, self.done = await self._begin(), 0
        elif self._uncertain:
            await self._ask_how_far(self._location)
        self._uncertain = True
        while self.done < self._size:
            await self._piece(self._location, min(self._size, self.done + self._connection.access.upload_bytes))
        await self._finish(self._location)

    async def _begin(self) -> httpx.URL:
        url = self._connection.url("blobs", "uploads/")
        async with self._connection.request("POST", url, {"Content-Length": "0"}) as response:
            if response.status_code != 202:
                raise await self._connection.refusal(response)
            return self._connection.location(response)

    async def _piece(self, location: httpx.URL, end: int) -> None:
        start = self.done
        headers = {**_BLOB_TYPE, "Content-Length": str(end - start), "Content-Range": f"{start}-{end - 1}"}
        async with self._connection.request("PATCH", location, headers, lambda: self._part(start, end)) as response:
            if response.status_code in (404, 416):
                self._location = None
                raise TryAgainError("the registry forgot an upload")
            if response.status_code not in (202, 204):
                raise await self._connection.refusal(response)
            self._location = self._connection.location(response)
            self.done = end

    async def _ask_how_far(self, location: httpx.URL) -> None:
        """A registry that does not tell gets all again."""
        async with self._connection.request("GET", location) as response:
            arrived = response.headers.get("Range", "").removeprefix("bytes=").partition("-")[2]
            if response.status_code != 204 or not arrived.isdecimal() or int(arrived) >= self._size:
                self._location = None
                raise TryAgainError("the registry does not say how much of an upload arrived")
            if "Location" in response.headers:
                self._location = self._connection.location(response)
            # "0-0" is what a registry says of nothing and of a single byte, which no piece is.
            self.done = int(arrived) + 1 if int(arrived) else 0

    async def _finish(self, location: httpx.URL, content: Content | None = None, size: int = 0) -> None:
        headers = {**_BLOB_TYPE, "Content-Length": str(size)}
        url = location.copy_merge_params({"digest": self._digest})
        async with self._connection.request("PUT", url, headers, content) as response:
            if response.status_code == 404:
                self._location = None
                raise TryAgainError("the registry forgot an upload")
            if response.status_code not in (201, 202, 204):
                raise await self._connection.refusal(response)

    async def _part(self, start: int, end: int) -> AsyncIterator[bytes]:
        region = Region(self._file.fileno(), start, end - start)
        sent = start
        while piece := region.read(_PIECE_BYTES):
            yield piece
            sent += len(piece)
            self._progress(sent)
