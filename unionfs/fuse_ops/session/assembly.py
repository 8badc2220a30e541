"""Opening a union: from mount options to a :class:`UnionTree`, with every layer checked and held."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable
from contextlib import suppress

from unionfs.errors import LayerError
from unionfs.fuse_ops.copy_up.unsynced import Unsynced, was_noted
from unionfs.fuse_ops.options import MountOptions, RedirectMode
from unionfs.fuse_ops.quota import Accounts, LimitedAccounts, SpaceLimit
from unionfs.fuse_ops.speedups.reading_ahead import DirectoryReadAhead
from unionfs.fuse_ops.stack.layer_dir import DescriptorCache, LayerDir, open_lower, open_upper
from unionfs.fuse_ops.stack.locations import check_separate, path_without_idmap
from unionfs.fuse_ops.stack.lower_stack import LowerStack
from unionfs.fuse_ops.stack.upper_dir import UpperDir
from unionfs.fuse_ops.stack.workdir import can_exchange, prepare_workdir, supports_xattrs
from unionfs.fuse_ops.tree.merged_view import MergedView
from unionfs.fuse_ops.union.union_tree import UnionTree
from unionfs.host.fs_magic import fs_magic, fs_name
from unionfs.overlay.format import OverlayXattrs, may_use_trusted

MAX_LOWER_LAYERS = 500  # as the kernel's overlayfs


def open_tree(options: MountOptions) -> UnionTree:
    """Open all layers of ``options`` as one tree; ``close()`` it after use.

    Raises :class:`LayerError` in one line for whatever cannot serve as a layer. ``tree.warnings`` has lines for the
    person who mounts.
    """
    if len(options.lowerdirs) + len(options.datadirs) > MAX_LOWER_LAYERS:
        raise LayerError(
            f"{len(options.lowerdirs) + len(options.datadirs)} lower layers; at most {MAX_LOWER_LAYERS} can be stacked"
        )
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    cache = DescriptorCache(min(soft // 8, 2048))
    opened: list[LayerDir] = []
    try:
        paths = [*options.lowerdirs, *options.datadirs]
        if options.upperdir is not None and options.workdir is not None and not options.read_only:
            check_separate(paths, options.upperdir, options.workdir)
        if options.uid_map or options.gid_map:
            paths = [path_without_idmap(path) for path in paths]
        layers = [_track(opened, open_lower(path, i, cache)) for i, path in enumerate(paths)]
        lowers, data = layers[: len(options.lowerdirs)], layers[len(options.lowerdirs) :]
        upper_layer = None
        if options.upperdir is not None and not options.read_only:
            upper_layer = _track(opened, open_upper(options.upperdir, cache))
        return _assemble(options, lowers, data, upper_layer, cache)
    except BaseException as error:
        cache.close()
        for layer in opened:
            layer.close()
        if isinstance(error, OSError):
            name = f"upperdir {options.upperdir}" if options.upperdir else f"lower layer {options.lowerdirs[0]}"
            raise LayerError(f"{name} cannot be mounted: {error.strerror}; see what its file system says") from None
        raise


def _track(opened: list[LayerDir], layer: LayerDir) -> LayerDir:
    opened.append(layer)
    return layer


def _assemble(
    options: MountOptions,
    lowers: list[LayerDir],
    data: list[LayerDir],
    upper_layer: LayerDir | None,
    cache: DescriptorCache,
) -> UnionTree:
    if upper_layer is None:
        xattrs = OverlayXattrs(user=options.userxattr or not may_use_trusted())
        return UnionTree(_lower_stack(options, lowers, data, xattrs), None, cache, options, xattrs)
    assert options.upperdir is not None
    assert options.workdir is not None
    _check_upper(options, upper_layer)
    work = prepare_workdir(options.workdir, options.upperdir, volatile=options.volatile, exclusive=options.exclusive)
    try:
        xattrs = _usable_xattrs(options, work.fd)
        _check_renames(options, work.fd)
        upper = UpperDir(upper_layer, work.fd, xattrs)
        lower = _lower_stack(options, lowers, data, xattrs)
        tree = UnionTree(lower, upper, cache, options, xattrs, _accounts(options, upper))
    except BaseException:
        work.close()
        raise
    tree.hold_claim(work.claim)
    tree.warnings.extend(work.warnings)
    try:
        if work.claim is not None and was_noted(work.claim.workdir_fd):
            _recover(tree, work.claim.workdir_fd)
    except BaseException:
        lower.observer.close()
        work.close()
        raise
    return tree


def _recover(tree: UnionTree, workdir_fd: int) -> None:
    from unionfs.fuse_ops.speedups.late_sync import recover  # here, because it is for mounts after a crash

    warnings = recover(tree)
    (tree.copy_up.unsynced or Unsynced(workdir_fd)).recovered(all_of_them=not warnings)
    tree.warnings.extend(warnings)


def _accounts(options: MountOptions, upper: UpperDir) -> Callable[[MergedView], Accounts]:
    if not options.quota_bytes:
        return lambda view: Accounts()
    limit = SpaceLimit(options.quota_bytes, (upper.layer.readable_fd, upper.work_fd))
    return lambda view: LimitedAccounts(view, limit)


def _usable_xattrs(options: MountOptions, work_fd: int) -> OverlayXattrs:
    for user in (True,) if options.userxattr else (False, True):
        xattrs = OverlayXattrs(user=user)
        if supports_xattrs(work_fd, xattrs):
            return xattrs
    raise LayerError(
        f"upperdir {options.upperdir}: its file system has no extended attributes; "
        "use one that has (ext4, xfs, btrfs, tmpfs)"
    )


def _check_renames(options: MountOptions, work_fd: int) -> None:
    with suppress(OSError):  # a disk that is full, say: then it shows when it matters
        if not can_exchange(work_fd):
            kind = fs_name(fs_magic(f"/proc/self/fd/{work_fd}"))
            raise LayerError(
                f"upperdir {options.upperdir}: its file system ({kind}) cannot exchange two names in one step "
                "(renameat2 with RENAME_EXCHANGE); use one that can (ext4, xfs, btrfs, tmpfs)"
            )


def _lower_stack(
    options: MountOptions, lowers: list[LayerDir], data: list[LayerDir], xattrs: OverlayXattrs
) -> LowerStack:
    return LowerStack(
        lowers,
        data,
        xattrs,
        follow_redirects=options.redirect_dir is not RedirectMode.NOFOLLOW,
        observer=DirectoryReadAhead() if "readahead" in options.speedups else None,
    )


def _check_upper(options: MountOptions, upper: LayerDir) -> None:
    if os.statvfs(b"/proc/self/fd/%d" % upper.fd).f_flag & os.ST_RDONLY:
        raise LayerError(f"upperdir {options.upperdir}: its file system is mounted read-only; mount it read-write")
    if not os.access(b"/proc/self/fd/%d" % upper.fd, os.W_OK, effective_ids=True):
        raise LayerError(f"upperdir {options.upperdir}: permission denied; it must be writable for you")
