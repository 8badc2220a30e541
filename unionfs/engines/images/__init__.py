"""Images without an engine: kept on a layer store, moved from and to archives, directories and registries.

::

    with open_store() as layers:
        images = ImageStore(layers)
        (image,) = import_images(images, "alpine.tar")
        rw = layers.create_rw_layer("my-container", image.chain_id)

What is meant for callers is named here, and in :mod:`unionfs.engines.images.registry` what needs the network; the
modules behind are these packages' own.
"""

from unionfs.engines.images.archives import import_images
from unionfs.engines.images.export import ExportOptions, Format, LayerCompression, export_stream, export_to
from unionfs.engines.images.install import Report
from unionfs.engines.images.model import Image, ImageConfig, Platform, parse_image
from unionfs.engines.images.reference import Reference, parse_reference
from unionfs.engines.images.store import ImageStore, Removed

__all__ = [
    "ExportOptions",
    "Format",
    "Image",
    "ImageConfig",
    "ImageStore",
    "LayerCompression",
    "Platform",
    "Reference",
    "Removed",
    "Report",
    "export_stream",
    "export_to",
    "import_images",
    "parse_image",
    "parse_reference",
]
