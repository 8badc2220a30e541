"""The empty layer: an archive of no files, which is never stored. What Docker's ``FROM scratch`` images stand on."""

from __future__ import annotations

import io
from typing import BinaryIO

from unionfs.archive.tar_format import END_OF_ARCHIVE
from unionfs.errors import LayerStoreError
from unionfs.layers.identity import ChainID, DiffID, diff_id_of

EMPTY_DIFF_ID: DiffID = diff_id_of(END_OF_ARCHIVE)


def is_empty(diff_id: str) -> bool:
    """Whether ``diff_id`` is the empty layer's."""
    return diff_id == EMPTY_DIFF_ID


class EmptyLayer:
    """Answers as a layer does. There is one, :data:`EMPTY_LAYER`."""

    chain_id = ChainID(EMPTY_DIFF_ID)
    diff_id = EMPTY_DIFF_ID
    parent = None
    os = ""
    size = 0
    diff_size = 0

    def tar_stream(self) -> BinaryIO:
        """1024 zero bytes."""
        return io.BytesIO(END_OF_ARCHIVE)

    def tar_stream_from(self, ancestor: str = "") -> BinaryIO:
        """The same for ``""``.

        Raises:
            LayerStoreError: for any other ancestor, there is none.
        """
        if ancestor:
            raise LayerStoreError("can't get parent tar stream of an empty layer; leave the ancestor out")
        return self.tar_stream()

    def metadata(self) -> dict[str, str]:
        """Nothing."""
        return {}


EMPTY_LAYER = EmptyLayer()
