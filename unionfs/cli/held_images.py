"""The images of a store, opened only where there are any: they hold layers, which every command must respect."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from unionfs.engines.images import ImageStore
    from unionfs.layers import LayerStore


def images_in(store: LayerStore) -> ImageStore | None:
    """The images, whose layers are held as long as ``store`` is open; None when it never had one."""
    records = getattr(store.records, "root", "")
    if not os.path.isdir(os.path.join(os.path.dirname(records), "imagedb")):
        return None
    # Here and not at the top: a store without images is opened faster without.
    from unionfs.engines.images import ImageStore

    return ImageStore(store)
