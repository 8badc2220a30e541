"""How often an engine holds each mount, written down at every change (see :mod:`session_file`)."""

from __future__ import annotations

import threading
from collections.abc import Mapping

from unionfs.engines.docker_plugin.messages import InitRequest
from unionfs.engines.docker_plugin.session_file import SavedSession, SessionFile


class HeldLayers:
    """Counts of one engine's session.

    Args:
        file: where they are written to.
        init: what is written with them.
        held: the counts to begin with.
    """

    def __init__(self, file: SessionFile, init: InitRequest, held: Mapping[str, int]) -> None:
        self._file = file
        self._init = init
        self._held = dict(held)
        self._lock = threading.Lock()
        self._save()

    def add(self, layer_id: str, step: int) -> None:
        """Count a Get (1) or a Put (-1); a Put without a Get counts nothing."""
        with self._lock:
            self._set(layer_id, self._held.get(layer_id, 0) + step)

    def forget(self, layer_id: str) -> None:
        """Drop the count of a layer that is removed."""
        with self._lock:
            self._set(layer_id, 0)

    def _set(self, layer_id: str, count: int) -> None:
        before = self._held.pop(layer_id, 0)
        if count > 0:
            self._held[layer_id] = count
        if max(count, 0) != before:
            self._save()

    def _save(self) -> None:
        self._file.save(SavedSession(init=self._init, held=self._held))
