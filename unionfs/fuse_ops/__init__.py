"""The union file system: layers stacked into one tree and served through FUSE.

A mount is made by :func:`unionfs.mounted`; here is what describes one.
"""

from unionfs import publish

__all__ = [
    "IdMap",
    "IdRange",
    "MountOptions",
    "ParsedOptions",
    "RedirectMode",
    "XattrPermissions",
    "default_fuse_options",
    "escape_value",
    "format_layers",
    "parse_options",
    "parse_size",
]

TYPE_CHECKING = False  # typing's, without the import
if TYPE_CHECKING:
    from unionfs.fuse_ops.options import MountOptions, RedirectMode, XattrPermissions, default_fuse_options
    from unionfs.fuse_ops.session.option_text import (
        ParsedOptions,
        escape_value,
        format_layers,
        parse_options,
        parse_size,
    )
    from unionfs.overlay.idmap import IdMap, IdRange

publish(
    __name__,
    {
        "options": "IdMap MountOptions RedirectMode XattrPermissions default_fuse_options",
        "session.option_text": "IdRange ParsedOptions escape_value format_layers parse_options parse_size",
    },
)
