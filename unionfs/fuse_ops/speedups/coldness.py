"""Whether what is read lately comes from the disk or from memory, judged by how long it takes."""

from __future__ import annotations

from typing import Final

_COLD_WEIGHT: Final = 16  # so many reads from memory make up for one from the disk: reading ahead makes them fast
_ACTIVE_FROM: Final = 2 * _COLD_WEIGHT  # one slow read may be an accident
_MOST: Final = 4 * _COLD_WEIGHT


class Coldness:
    """Counts slow reads against fast ones."""

    __slots__ = ("_score",)

    def __init__(self) -> None:
        self._score = 0

    @property
    def is_cold(self) -> bool:
        """Whether the disk was waited for lately, so that reading ahead may save something."""
        return self._score >= _ACTIVE_FROM

    def took(self, seconds: float, warm_s: float) -> None:
        """A read took ``seconds``; from memory it takes ``warm_s`` at most."""
        if seconds > warm_s:
            self._score = min(self._score + _COLD_WEIGHT, _MOST)
        elif self._score:
            self._score -= 1
