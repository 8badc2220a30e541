"""Uploading a blob: in one request, or a large one in pieces of which none is sent twice without need.

Source: OCI distribution specification, "Pushing blobs".
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import BinaryIO

import httpx

from unionfs.engines.images.registry.connection import Connection, Content
from unionfs.engines.images.registry.retry import TryAgainError
from unionfs.engines.images.tar_files import Region

_PIECE_BYTES = 1 << 18
_TYPE = {"Content-Type": "application/octet-stream"}

Progress = Callable[[int], None]


async def upload(connection: Connection, digest: str, size: int, file: BinaryIO, progress: Progress) -> None:
    """See :meth:`unionfs.engines.images.registry.client.RegistryClient.upload`."""
    one = _Upload(connection, digest, size, file, progress)
    if size <= connection.access.upload_bytes:
        await connection.keep_trying(one.whole)
    else:
        await connection.keep_trying(one.pieces, lambda: one.done)


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
        headers = {**_TYPE, "Content-Length": str(end - start), "Content-Range": f"{start}-{end - 1}"}
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
        headers = {**_TYPE, "Content-Length": str(size)}
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
