"""Layers as archives: tar streams packed and unpacked, and what one tree has that another has not."""

from unionfs import publish

__all__ = [
    "Change",
    "ChangeKind",
    "Compression",
    "DevicePolicy",
    "IdMapping",
    "OverlayXattrs",
    "PackOptions",
    "PieceStream",
    "Readable",
    "Spaces",
    "UnpackOptions",
    "UnpackResult",
    "WhiteoutMode",
    "XattrSelection",
    "changes_of_trees",
    "changes_of_upper",
    "open_archive",
    "pack_changes",
    "pack_tree",
    "size_of",
    "tree_size",
    "unpack",
]

TYPE_CHECKING = False  # typing's, without the import
if TYPE_CHECKING:
    from unionfs.archive.changes import Change, ChangeKind, changes_of_trees, changes_of_upper, size_of
    from unionfs.archive.compression import Compression, open_archive
    from unionfs.archive.idmapping import IdMapping
    from unionfs.archive.pack import PackOptions, XattrSelection, pack_changes, pack_tree
    from unionfs.archive.sizes import tree_size
    from unionfs.archive.stream import PieceStream
    from unionfs.archive.tar_reader import Readable
    from unionfs.archive.unpacking import DevicePolicy, UnpackOptions, UnpackResult, WhiteoutMode, unpack
    from unionfs.overlay.format import OverlayXattrs
    from unionfs.overlay.rules import Spaces

publish(
    __name__,
    {
        "changes": "Change ChangeKind Spaces changes_of_trees changes_of_upper size_of",
        "compression": "Compression open_archive",
        "idmapping": "IdMapping",
        "layer_target": "OverlayXattrs",
        "pack": "PackOptions XattrSelection pack_changes pack_tree",
        "sizes": "tree_size",
        "stream": "PieceStream",
        "tar_reader": "Readable",
        "unpacking": "DevicePolicy UnpackOptions UnpackResult WhiteoutMode unpack",
    },
)
