"""Downloading a blob: what was cut off goes on where it ended, and the whole is checked."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from typing import BinaryIO

from unionfs.engines.images.registry.connection import Connection, is_encoded
from unionfs.engines.images.registry.retry import TryAgainError
from unionfs.errors import DigestMismatchError, RegistryError
from unionfs.layers.identity import ALGORITHM, digits_of

_CONTENT_RANGE = re.compile(r"bytes (\d+)-\d+/(?:\d+|\*)")


class _Download:
    """What there is of a blob.

    Attributes:
        in_parts: it can be gone on with where it ended.
    """

    def __init__(self, file: BinaryIO, size: int, progress: Callable[[int], None]) -> None:
        self.size = size
        self.in_parts = True
        self._file = file
        self._progress = progress
        self.start_again()

    def start_again(self) -> None:
        self.done = 0
        self.digest = hashlib.sha256()
        self._file.seek(0)
        self._file.truncate()

    def write(self, piece: bytes) -> None:
        self.done += len(piece)
        if self.done > self.size:
            raise RegistryError(f"the registry gives more than the {self.size} bytes that it promised for a blob")
        self.digest.update(piece)
        self._file.write(piece)
        self._progress(self.done)


async def download(
    connection: Connection, digest: str, size: int, file: BinaryIO, progress: Callable[[int], None]
) -> None:
    """See :meth:`unionfs.engines.images.registry.client.RegistryClient.download`."""
    # Once more from the start: something on the way may have kept a wrong copy, or put two together.
    for _ in range(2):
        state = _Download(file, size, progress)
        await connection.keep_trying(_Part(connection, digest, state).get, lambda state=state: state.done)  # type: ignore[misc]
        if state.digest.hexdigest() == digits_of(digest):
            file.flush()
            return
    raise DigestMismatchError(
        f"a blob from {connection.registry} is {ALGORITHM}:{state.digest.hexdigest()}, but {digest} was expected; "
        "try again later"
    )


class _Part:
    """Gets what is still missing."""

    def __init__(self, connection: Connection, digest: str, state: _Download) -> None:
        self._connection = connection
        self._digest = digest
        self._state = state

    async def get(self) -> None:
        state = self._state
        headers = {"Range": f"bytes={state.done}-"} if state.done and state.in_parts else {}
        if state.size and state.done == state.size:
            return
        url = self._connection.url("blobs", self._digest)
        async with self._connection.request("GET", url, headers) as response:
            if response.status_code == 416 or (
                response.status_code == 206 and not _starts_at(response.headers.get("Content-Range", ""), state.done)
            ):
                state.start_again()
                raise TryAgainError("the registry gave another part of a blob than it was asked for")
            if response.status_code == 200:
                state.start_again()  # it does not know about parts
            elif response.status_code != 206:
                raise await self._connection.refusal(response, self._digest)
            # As they come: pieces of one size would be kept back until they are full, and lost with the connection.
            pieces = response.aiter_raw()
            if is_encoded(response) and response.headers.get("Content-Length") != str(state.size - state.done):
                # Otherwise it is the blob itself, which some storage calls an encoding because it is a gzip file.
                pieces = response.aiter_bytes()
                state.in_parts = False
                if state.done:
                    raise TryAgainError("a part of a blob was compressed on the way")
            async for piece in pieces:
                state.write(piece)
        if state.done < state.size:
            raise TryAgainError(f"a blob ended after {state.done} of {state.size} bytes")


def _starts_at(content_range: str, offset: int) -> bool:
    found = _CONTENT_RANGE.fullmatch(content_range.strip())
    return found is not None and int(found[1]) == offset
