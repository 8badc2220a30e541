"""Images without an engine: kept on a layer store, moved from and to archives, directories and registries.

::

    with open_store() as layers:
        images = ImageStore(layers)
        image = images.get("alpine")
        rw = layers.create_rw_layer("my-container", image.chain_id)

What is meant for callers is named here; the modules behind are this package's own.
"""

from unionfs.engines.images.model import Image, ImageConfig, Platform, parse_image
from unionfs.engines.images.reference import Reference, parse_reference
from unionfs.engines.images.store import ImageStore, Removed

__all__ = [
    "Image",
    "ImageConfig",
    "ImageStore",
    "Platform",
    "Reference",
    "Removed",
    "parse_image",
    "parse_reference",
]
