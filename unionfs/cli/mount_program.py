"""The old place of ``unionfs-mount``, for what an earlier scripts/setup made: see session/mount_program."""

from unionfs.fuse_ops.session.mount_program import main

__all__ = ["main"]
