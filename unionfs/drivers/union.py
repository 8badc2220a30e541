"""The ``unionfs`` driver: our own file system over overlay2's home layout. It is the default.

Any kernel with FUSE will do, renaming directories works, and there is no limit from the size of a page.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress

from unionfs.archive.idmapping import IdMapping
from unionfs.drivers.contract import CREATING
from unionfs.drivers.layered import LayeredDriver, SizeLimits, Stack
from unionfs.drivers.overlay_home import DEFAULT_MAX_DEPTH, OverlayHome
from unionfs.drivers.quota import NoQuota, project_limits
from unionfs.drivers.storage_options import parse_options
from unionfs.errors import DriverError, IncompatibleFilesystemError, MountError, OptionError, PrerequisitesError
from unionfs.fuse_ops.session import mount_registry
from unionfs.fuse_ops.session.mount_registry import MountRecord
from unionfs.fuse_ops.session.option_text import escape_value, format_layers, parse_size
from unionfs.fuse_ops.session.supervisor import client as supervisor
from unionfs.fuse_ops.stack.workdir import can_exchange
from unionfs.host import mounts, unmount
from unionfs.host.fs_magic import fs_magic, fs_name
from unionfs.host.processes import has_ended, open_process
from unionfs.host.selinux import mount_context
from unionfs.host.syscalls import in_user_namespace

_OPTIONS = ("unionfs.size", "unionfs.redirect_dir", "unionfs.max_depth")
SIZE_NAME = "size"
"""The file in a layer's directory that holds its limit in bytes; overlay2 does not have one and ignores it."""

_SIZE_MAX_CHARACTERS = 19  # 2^63 - 1 has as many digits

_REDIRECTS = ("on", "follow", "nofollow", "off")


def init(root: str, options: Sequence[str], id_mapping: IdMapping) -> UnionDriver:
    """Make the driver with its home at ``root`` (an :data:`unionfs.drivers.contract.InitFunc`).

    Options: ``unionfs.size`` (limit for container layers without one of their own); ``unionfs.redirect_dir=off``
    (renaming a directory of a parent fails with EXDEV as in Docker's overlay2, so that Docker finds nothing in the home
    that it does not handle); ``unionfs.max_depth`` (parents that a layer may have, 128 unless given).

    Raises:
        PrerequisitesError: there is no ``/dev/fuse``, or we may not use it.
        IncompatibleFilesystemError: the file system of ``root`` takes no whiteouts or no extended attributes.
    """
    given = parse_options(options, _OPTIONS, "unionfs")
    redirect = given.get("unionfs.redirect_dir", "on")
    if redirect not in _REDIRECTS:
        raise OptionError(f"unionfs: option unionfs.redirect_dir={redirect}: write one of {', '.join(_REDIRECTS)}")
    depth = given.get("unionfs.max_depth", str(DEFAULT_MAX_DEPTH))
    if not depth.isdecimal() or int(depth) == 0:
        raise OptionError(f"unionfs: option unionfs.max_depth={depth}: write a number of layers")
    check_fuse()
    layers = OverlayHome(root, id_mapping, int(depth))
    check_filesystem(layers.root)
    size = parse_size(given.get("unionfs.size", "0"))
    limits = union_limits(layers.root)
    if size:
        limits.check()
    return UnionDriver(layers, id_mapping, redirect, limits, size)


def look(root: str, options: Sequence[str], id_mapping: IdMapping) -> UnionDriver:
    """The driver to look at a home with (a :data:`unionfs.drivers.contract.LookFunc`); options are as for init."""
    parse_options(options, _OPTIONS, "unionfs")
    return UnionDriver(OverlayHome(root, id_mapping), id_mapping, "on", UnionLimits(), 0, read_only=True)


class UnionDriver(LayeredDriver):
    """See :func:`init`."""

    def __init__(
        self,
        layers: OverlayHome,
        id_mapping: IdMapping,
        redirect_dir: str,
        limits: SizeLimits,
        default_size_bytes: int,
        *,
        read_only: bool = False,
    ) -> None:
        super().__init__(
            "unionfs",
            layers,
            FuseMounter((*_mount_options(), f"redirect_dir={redirect_dir}")),
            limits,
            id_mapping,
            default_size_bytes=default_size_bytes,
            read_only=read_only,
        )
        self._redirect_dir = redirect_dir

    def status(self) -> list[tuple[str, str]]:
        """See :meth:`ProtoDriver.status`."""
        return [
            ("Backing Filesystem", fs_name(fs_magic(self._layers.root))),
            ("Native Overlay Diff", "true"),
            ("Redirect dir", self._redirect_dir),
        ]


class UnionLimits:
    """:class:`SizeLimits` enforced by the server of the mount, which is told with the option ``quota``."""

    def check(self) -> None:
        """See :meth:`SizeLimits.check`."""

    def apply(self, directory: str, size_bytes: int) -> None:
        """See :meth:`SizeLimits.apply`: the number is kept beside the layer, for every mount to come."""
        with open(os.path.join(directory, SIZE_NAME), "w", encoding="ascii") as file:
            file.write(str(size_bytes))

    def mount_limit(self, directory: str) -> int:
        """See :meth:`SizeLimits.mount_limit`."""
        path = os.path.join(directory, SIZE_NAME)
        try:
            with open(path, "rb") as file:
                text = file.read(_SIZE_MAX_CHARACTERS + 1).strip()
        except FileNotFoundError:
            return 0
        if text and not (text.isdigit() and len(text) <= _SIZE_MAX_CHARACTERS and int(text) < 1 << 63):
            raise DriverError(f"{path} holds {text[:20]!r}; write a number of bytes into it, or remove it for no limit")
        return int(text or b"0")


def union_limits(home: str) -> SizeLimits:
    """Limits by project quota where the file system has them, otherwise by the union itself."""
    limits = project_limits(home)
    return UnionLimits() if isinstance(limits, NoQuota) else limits


def _mount_options() -> tuple[str, ...]:
    """What a container may find in its root: devices and setuid programs, as with overlay2; only root can grant it."""
    return ("dev", "suid") if os.geteuid() == 0 else ()


def check_fuse() -> None:
    """Raise :class:`PrerequisitesError` unless we may mount with FUSE."""
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        step = "load the kernel module with: modprobe fuse"
        if error.errno in (errno.EPERM, errno.EACCES):
            step = "give this user access, for example with: chmod 666 /dev/fuse"
        raise PrerequisitesError(f"/dev/fuse: {error.strerror}; {step}") from error


def check_filesystem(root: str) -> None:
    """Raise :class:`IncompatibleFilesystemError` unless the file system of ``root`` can hold layers.

    What a layer needs is tried, rather than every file system known by name.
    """
    where = tempfile.mkdtemp(prefix="check-unionfs-support", suffix=CREATING, dir=root)
    try:
        prefix = "user" if in_user_namespace() or os.geteuid() != 0 else "trusted"
        os.setxattr(where, f"{prefix}.overlay.opaque", b"y")
        os.mknod(where + "/whiteout", stat.S_IFCHR, 0)
        _require_exchange(where)
    except OSError as error:
        raise IncompatibleFilesystemError(
            f"{root}: its file system ({fs_name(fs_magic(root))}) cannot hold layers ({error.strerror}); "
            "use ext4, xfs, btrfs or tmpfs"
        ) from error
    finally:
        with suppress(FileNotFoundError):
            os.unlink(where + "/whiteout")
        os.rmdir(where)


def _require_exchange(directory: str) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if not can_exchange(fd):
            raise OSError(errno.EOPNOTSUPP, "it cannot exchange two names in one step")
    finally:
        os.close(fd)


# Mounting through the file system's own program, one server process for each mount. The server is a daemon: it outlives
# the process that asked for it, as containers do.

_log = logging.getLogger(__name__)

# A server that is unmounted has nothing left to do but to write back; one that does not end is stuck.
_END_S = 30.0
_LEAVING_S = 3.0  # for what uses a mount in another namespace, and may be about to end
_SETTLE_S = 2.0
_POLL_S = 0.005


class FuseMounter:
    """A :class:`unionfs.drivers.layered.Mounter` that runs ``unionfs-mount``.

    Args:
        options: more of them for ``-o``.
    """

    def __init__(self, options: tuple[str, ...] = ()) -> None:
        self._options = options

    def mount(self, stack: Stack) -> None:
        """See :meth:`Mounter.mount`."""
        options = ["lowerdir=" + format_layers(stack.lowers)]
        if stack.upper is not None and stack.work is not None:
            options += ["upperdir=" + escape_value(stack.upper), "workdir=" + escape_value(stack.work)]
        context = mount_context(stack.mount_label)
        if context is not None:
            options.append(f'context="{context}"')
        if stack.size_bytes:
            options.append(f"quota={stack.size_bytes}")
        options += self._options
        status, output = _mount(["-o", ",".join(options), stack.target])
        said = " ".join(output.decode(errors="replace").split())
        if status != 0:
            raise MountError(said.removeprefix("unionfs-mount: ") or f"cannot mount {stack.target}: see the system log")
        if said:
            _log.warning("%s: %s", stack.target, said)

    def take_down(self, target: str, *, lazy: bool) -> None:
        """See :meth:`Mounter.take_down`."""
        server = mount_registry.find(mounts.top_mount(target))
        ended = None if server is None else open_process(server.pid, server.started)
        try:
            unmount.take_down(target, lazy=lazy)
            if server is not None and ended is not None and not lazy:
                _wait(target, server, ended)
        finally:
            if ended is not None:
                os.close(ended)

    def settle(self, target: str) -> None:
        """See :meth:`Mounter.settle`."""
        point = mounts.top_mount(target)
        # This has the server make links of names that it found of copied-up files: who reads the upper sees them.
        fd = os.open(target, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            with contextlib.suppress(OSError):  # a disk that fails must not keep the mount from being taken down
                os.fsync(fd)
        finally:
            os.close(fd)
        unmount.sync_mount(target)
        # Before Linux 6.16, syncfs(2) on FUSE does not wait for the writes that it has started; the kernel counts them.
        if point is not None:
            _wait_for_requests(point.minor)


def _mount(arguments: list[str]) -> tuple[int, bytes]:
    """Run unionfs-mount with ``arguments``, or have the supervisor serve that; the exit status and what it said."""
    # -P: nothing is to be imported from whatever directory we are started in.
    command = [sys.executable, "-P", "-m", "unionfs.fuse_ops.session.mount_program", *arguments]
    with contextlib.ExitStack() as opened:
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        opened.callback(os.close, null)
        said = os.memfd_create("unionfs-mount", os.MFD_CLOEXEC)  # not a pipe, which would have to be read meanwhile
        opened.callback(os.close, said)
        status = supervisor.mount(arguments, command, os.environb, (null, null, said))
        if status is not None:
            return status, os.pread(said, os.fstat(said).st_size, 0)
    done = subprocess.run(
        command, cwd="/", stdin=subprocess.DEVNULL, capture_output=True, check=False, start_new_session=True
    )
    return done.returncode, done.stderr


def _wait(target: str, server: MountRecord, ended: int) -> None:
    """Wait for the end of a server whose mount is gone here; kill one that does not end though nobody uses it."""
    used = mounts.is_mounted_anywhere(server.minor)
    if used and mounts.is_mounted_here(server.minor):
        return  # bound to other places too
    # The namespace of a container that has ended goes a moment later.
    if has_ended(ended, _LEAVING_S if used else _END_S):
        return
    if used is not False:
        _log.warning(
            "%s: something in another mount namespace still uses it; its server (process %d) ends with that",
            target,
            server.pid,
        )
        return
    _log.error("%s: its server (process %d) did not end after the unmount; it is killed", target, server.pid)
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(ended, signal.SIGKILL)
    has_ended(ended, _END_S)


def _wait_for_requests(minor: int) -> None:
    """Wait until the server has answered what it was asked, for a short time: it may be asked all the while."""
    deadline = time.monotonic() + _SETTLE_S
    while time.monotonic() < deadline and mounts.waiting_requests(minor):
        time.sleep(_POLL_S)
