"""The size of a layer directory as engines report it."""

from __future__ import annotations

import os

from unionfs.errors import ArchiveError
from unionfs.host.files import measure_tree


def tree_size(root: str | bytes) -> int:
    """Bytes in the files beneath ``root``: lengths, not disk blocks, a file with several names once.

    What Docker's overlay2 reports for a layer after applying it. Directories count nothing,
    and entries that go away meanwhile are left out.

    Args:
        root: the layer directory.

    Raises:
        ArchiveError: ``root`` is missing or is no directory.
    """
    try:
        return measure_tree(root).length_bytes
    except OSError as error:
        raise ArchiveError(
            f"cannot measure {os.fsdecode(root)}: {error.strerror}; give the path of an existing directory"
        ) from error
