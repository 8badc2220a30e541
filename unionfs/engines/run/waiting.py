"""Opening a layer store that others use for moments: containers that start and end side by side take turns."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager

from unionfs.errors import StoreLockedError
from unionfs.layers import LayerStore, open_store

PATIENCE_S = 180.0
"""For twenty others that start at once on a slow machine; a long pull is not waited for."""


@contextmanager
def open_when_free(root: str | None, driver: str, patience_s: float = PATIENCE_S) -> Iterator[LayerStore]:
    """The store, as soon as nobody has it open.

    Args:
        root, driver: see :func:`unionfs.layers.open_store`.
        patience_s: how long to wait.

    Raises:
        StoreLockedError: somebody still has it open.
    """
    deadline = time.monotonic() + patience_s
    while True:
        try:
            store = open_store(root, driver)
            break
        except StoreLockedError:
            if time.monotonic() > deadline:
                raise
        # Not in step with the others who wait.
        time.sleep(random.uniform(0.01, 0.05))
    with store:
        yield store
