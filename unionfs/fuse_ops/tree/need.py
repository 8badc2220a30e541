"""What a change needs of the file that is copied up for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass
class Need:
    """How much of a file has to be in the upper layer, and when on the disk. Not to be changed.

    Attributes:
        data: whether the contents are about to be changed, and not the metadata only.
        size: how many bytes of the data will matter (truncation); None is all of them.
        later: whether the data may come to the disk later; only for what keeps its name and contents.
    """

    data: bool = True
    size: int | None = None
    later: bool = False

    def bytes_of(self, size: int) -> int:
        """How many of the ``size`` bytes of a file have to be copied, if its data has to."""
        return size if self.size is None else min(self.size, size)


CONTENTS: Final = Need()
"""For writing."""
NO_CONTENTS: Final = Need(size=0)
"""For writing after a truncation."""
METADATA: Final = Need(data=False)
"""For a new name."""
ATTRIBUTES: Final = Need(data=False, later=True)
"""For new attributes under the old name."""


def for_name(*, unsynced: bool) -> Need:
    """What a new name for a file needs, which is ``unsynced`` if its data is not on the disk yet."""
    return CONTENTS if unsynced else METADATA


def for_attributes(size: int | None) -> Need:
    """What new attributes need, a new ``size`` among them or not."""
    return ATTRIBUTES if size is None else Need(size=size, later=True)
