"""A mount that lives as long as a block of a Python program: served by its trio loop, or by a process beside it."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Final, Literal, TypeVar

import trio

from unionfs.errors import LayerError, MountError, OptionError
from unionfs.fuse_ops.options import MountOptions, RedirectMode, XattrPermissions
from unionfs.fuse_ops.session import mount_registry
from unionfs.fuse_ops.session.assembly import open_tree
from unionfs.fuse_ops.session.mount_server import checked_target
from unionfs.fuse_ops.session.option_text import escape_value, parse_options
from unionfs.fuse_ops.session.session import Session
from unionfs.fuse_ops.transports.choice import choose_transport
from unionfs.host import mounts, unmount
from unionfs.host.mounts import holders, is_mounted_anywhere
from unionfs.host.processes import has_ended, open_process
from unionfs.overlay.idmap import IdRange

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

Path = str | os.PathLike[str]

# These keep the one thread of a server busy or change how it is scheduled, and here that thread is the program's own.
_NOT_IN_A_PROGRAM: Final = frozenset({"inline", "placement", "polling"})

_LEAVING_S: Final = 5.0  # for processes that still use the mount at the end of the block
_END_S: Final = 60.0  # for a server to write everything
_POLL_S: Final = 0.05


@dataclass(frozen=True, slots=True)
class Mount:
    """A union that is mounted.

    Attributes:
        target: the mount point, an absolute path without symbolic links.
        pid: the process that serves it: this one, or another; None where that left no record.
        transport: how requests reach it: ``direct``, ``direct, passthrough`` or ``pyfuse3``; empty where nothing says.
        minor: the minor number of the device that its files are on; the major number is 0.
    """

    target: str
    pid: int | None
    transport: str
    minor: int

    def __fspath__(self) -> str:
        return self.target


class _Ends:
    """The beginning and the end of a session."""

    def __init__(self) -> None:
        self.accepted = trio.Event()
        self.gone = trio.Event()


def mounted(
    *,
    lower: Sequence[Path],
    target: Path,
    upper: Path | None = None,
    work: Path | None = None,
    data: Sequence[Path] = (),
    read_only: bool = False,
    source: str = "unionfs",
    transport: Literal["auto", "direct", "pyfuse3"] = "auto",
    quota: int = 0,
    redirect_dir: RedirectMode | Literal["on", "off", "follow", "nofollow"] = RedirectMode.ON,
    metacopy: bool = False,
    volatile: bool = False,
    fsync: bool = True,
    timeout_s: float | None = None,
    uid_map: Sequence[IdRange] = (),
    gid_map: Sequence[IdRange] = (),
    squash_uid: int | None = None,
    squash_gid: int | None = None,
    xattr_permissions: XattrPermissions = XattrPermissions.OFF,
    userxattr: bool = False,
    exclusive: bool = True,
    options: Sequence[str] = (),
) -> Mounting:
    """Describe a mount, to be used as ``async with mounted(...)`` in a trio program or as ``with mounted(...)``.

    Nothing happens before the block is entered. See :class:`Mounting` for what the two forms do.

    Args:
        lower: the read-only layers, the top one first.
        target: an existing directory to mount on.
        upper: takes all changes; without it the mount is read-only.
        work: belongs to the upper, on the same file system; ``UPPER.work`` unless given, created when it is missing.
        data: layers that only hold the data of metadata-only copies.
        read_only: refuse all changes.
        source: what the mount table shows as the device.
        transport: how requests are brought from the kernel; ``auto`` takes the fastest that this kernel can do.
        quota: how many bytes the upper may take; 0 for no limit.
        redirect_dir: what renaming a directory of a layer does.
        metacopy: copy up attributes alone when only they are changed.
        volatile: never wait for the disk; the upper is lost when the machine crashes.
        fsync: whether fsync waits for the disk.
        timeout_s: how many seconds the kernel may remember what it was told; long unless given.
        uid_map: how the owners in the layers are shown: ``count`` ids from ``container`` as those from ``host``.
        gid_map: the same for groups.
        squash_uid: show everything as owned by this user.
        squash_gid: show everything as owned by this group.
        xattr_permissions: where owner and mode are kept if the layers' file system cannot hold them.
        userxattr: mark the upper with ``user.overlay.*`` in place of ``trusted.overlay.*``.
        exclusive: refuse an upper or a work directory that another mount uses.
        options: any others, as ``unionfs-mount -o`` takes them, such as ``nodev`` or ``noacl``.

    Raises:
        OptionError: options that cannot work, or unknown ones.
    """
    makes_work = upper is not None and work is None
    if upper is not None and work is None:
        work = os.path.normpath(os.fspath(upper)) + ".work"
    words = [f"lowerdir+={escape_value(os.fspath(path))}" for path in lower]
    words += [f"datadir+={escape_value(os.fspath(path))}" for path in data]
    for name, path in (("upperdir", upper), ("workdir", work)):
        if path is not None:
            words.append(f"{name}={escape_value(os.fspath(path))}")
    for name, ids in (("uidmapping", uid_map), ("gidmapping", gid_map)):
        if ids:
            words.append(f"{name}=" + ":".join(f"{one.container}:{one.host}:{one.count}" for one in ids))
    for name, value in (("quota", quota or None), ("squash_to_uid", squash_uid), ("squash_to_gid", squash_gid)):
        if value is not None:
            words.append(f"{name}={value}")
    if timeout_s is not None:
        words.append(f"timeout={timeout_s}")
    words += [
        f"fsname={escape_value(source)}",
        f"transport={transport}",
        f"redirect_dir={RedirectMode(redirect_dir).value}",
        f"metacopy={'on' if metacopy else 'off'}",
        f"fsync={int(fsync)}",
        f"xattr_permissions={xattr_permissions.value}",
    ]
    switches = {"ro": read_only, "volatile": volatile, "userxattr": userxattr, "exclusive": exclusive}
    words += [word for word, on in switches.items() if on]
    words += options
    parsed = parse_options(words)
    if parsed.ignored:
        raise OptionError(f"unknown option {', '.join(parsed.ignored)}; leave it out, see docs/unionfs-mount.md")
    return Mounting(parsed.options, tuple(words), os.fspath(target), makes_work=makes_work)


class Mounting(AbstractAsyncContextManager[Mount], AbstractContextManager[Mount]):
    """What :func:`mounted` gives: a mount that is there as long as a block, in one of two forms. Each is used once.

    ``async with`` serves the mount from the trio program that runs the block, in the thread of its loop: there is no
    other loop, no process and no signal handler. If serving fails, or somebody else unmounts it, the block is cancelled
    and the error raised. Such a program must not wait for its own mount in the thread that serves it, which would wait
    for itself: use ``trio.to_thread``, ``trio.Path`` or another process. See the guide for what does not work even so.

    ``with`` has another process serve it, as ``unionfs mount`` does, for programs without trio and for those that
    cannot keep to that. If the program is killed the mount stays, with its server, until ``unionfs umount``.

    At the end of the block the mount is gone, however the block ended, and everything is written to the upper. A
    process that still uses it after five seconds is cut off: the mount answers it with ``ENOTCONN``. With passthrough
    it can go on writing to files of the upper that it has open; ``options=["passthrough=0"]`` prevents that.

    Raises:
        MountError: the kernel or the host refused the mount, or the mount point cannot be used. With the form ``with``
            also what is wrong with a layer.
        LayerError: a layer, upper or work directory cannot be used as such.
    """

    def __init__(self, options: MountOptions, words: Sequence[str], target: str, *, makes_work: bool) -> None:
        self._options = options
        self._words = words
        self._target = target
        self._makes_work = makes_work
        self._beside: AbstractContextManager[Mount] | None = None
        self._here: AbstractAsyncContextManager[Mount] | None = None

    async def __aenter__(self) -> Mount:
        if not trio.lowlevel.in_trio_run():
            raise MountError("async with unionfs.mounted(...) needs trio; in a program without it, leave out async")
        self._here = self._served_here()
        return await self._here.__aenter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        assert self._here is not None
        return await self._here.__aexit__(kind, error, traceback)

    def __enter__(self) -> Mount:
        self._beside = self._served_beside()
        return self._beside.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        assert self._beside is not None
        return self._beside.__exit__(kind, error, traceback)

    # -- by the program's own loop --------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def _served_here(self) -> AsyncIterator[Mount]:
        self._check_layers()
        target = await _in_thread(lambda: checked_target(self._target))
        options = replace(self._options, speedups=self._options.speedups - _NOT_IN_A_PROGRAM)
        self._make_work()
        tree = await _in_thread(lambda: open_tree(options))
        try:
            for warning in tree.warnings:
                _log.warning("%s: %s", target, warning)
            transport = choose_transport(tree, options)
            ends = _Ends()

            def gone() -> None:
                tree.end_soon()
                ends.gone.set()

            session = Session(transport, options, target, ends.accepted.set, gone)
            try:
                session.mount()
                try:
                    with _served(target):
                        async with self._serving(session, options, ends):
                            yield Mount(target, os.getpid(), transport.name, session.minor)
                finally:
                    session.finish()
            finally:
                session.close()
        finally:
            with trio.CancelScope(shield=True):
                await _in_thread(tree.close)

    @contextlib.asynccontextmanager
    async def _serving(self, session: Session, options: MountOptions, ends: _Ends) -> AsyncIterator[None]:
        """Serve as long as the block lasts. An exception comes out as it is, several of them as a group."""
        target = self._target
        failed: BaseException | None = None
        # What cancels the block must not cancel this too, which is needed to unmount.
        serving = trio.CancelScope(shield=True)
        over = ending = False

        @trio.lowlevel.enable_ki_protection
        async def serve() -> None:
            nonlocal over
            try:
                with serving:
                    await session.serve()
            finally:
                over = True
            if not ends.accepted.is_set():
                raise MountError(f"cannot mount on {target}: the session ended before it began; see the log")
            if not ending:
                raise MountError(f"{target} was unmounted by somebody else while it was in use; mount it again")

        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(serve)
                try:
                    await ends.accepted.wait()
                    yield
                finally:
                    ending = True
                    with trio.CancelScope(shield=True):
                        if not over and not await _unmounted(session, options, ends.gone):
                            serving.cancel()
        except BaseExceptionGroup as group:
            failed = group.exceptions[0] if len(group.exceptions) == 1 else group
        if failed is not None:
            raise failed

    # -- by a process beside it -----------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _served_beside(self) -> Iterator[Mount]:
        if trio.lowlevel.in_trio_run():
            self._check_layers()
        target = checked_target(self._target)
        self._make_work()
        arguments = [argument for word in self._words for argument in ("-o", word)]
        # -P: nothing is to be imported from whatever directory this is.
        command = [sys.executable, "-P", "-m", _PROGRAM, *arguments, "--", target]
        try:
            done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        except BaseException:  # ^C, after the mount was made
            left = mounts.top_mount(target)
            if left is not None and left.is_union:
                _take_down(target, left.minor, None)
            raise
        said = [line.removeprefix("unionfs-mount: ") for line in done.stderr.splitlines()]
        if done.returncode:
            raise MountError(said[-1] if said else f"cannot mount on {target}: see the system log")
        for line in said:
            _log.warning("%s: %s", target, line)
        top = mounts.top_mount(target)
        if top is None:
            raise MountError(f"{target} was unmounted by somebody else at once; mount it again")
        # A mount works without its record, which a user may have no place for.
        record = mount_registry.find(top)
        server = None if record is None else open_process(record.pid, record.started)
        try:
            if record is None:
                yield Mount(target, None, "", top.minor)
            else:
                yield Mount(target, record.pid, record.transport, top.minor)
        finally:
            try:
                _take_down(target, top.minor, server)
            finally:
                if server is not None:
                    os.close(server)

    # -- both ---------------------------------------------------------------------------------------------------

    def _check_layers(self) -> None:
        """Refuse directories that the thread which is to open them serves itself."""
        options = self._options
        for path in (*options.lowerdirs, *options.datadirs, options.upperdir, options.workdir, self._target):
            whole = os.path.abspath(path or "/")
            for served in _targets:
                if os.path.commonpath((whole, served)) == served:
                    raise LayerError(
                        f"{path} lies in {served}, which this program serves: it would wait for itself; "
                        "have that served by another process (with unionfs.mounted(...), without async)"
                    )

    def _make_work(self) -> None:
        if not self._makes_work or self._options.workdir is None:
            return
        try:
            os.mkdir(self._options.workdir, 0o700)
        except FileExistsError:
            pass
        except OSError as error:
            raise MountError(
                f"cannot create the work directory {self._options.workdir}: {error.strerror}; name another with work="
            ) from None


_PROGRAM: Final = "unionfs.fuse_ops.session.mount_program"

_targets: set[str] = set()
"""Where this process serves mounts."""
_lock = threading.Lock()


@contextlib.contextmanager
def _served(target: str) -> Iterator[None]:
    """Note a mount that this process serves, and have programs started in a way that does not wait for it.

    By default subprocess uses vfork(2) or posix_spawn(3) and keeps Python's lock until the new program's file has been
    opened. When that is on the mount, or the directory to start in is, the server would wait for the lock. The two
    switches are documented (subprocess, "Disabling use of vfork() or posix_spawn()").
    """
    with _lock:
        if not _targets:
            _switch_spawning(False)
        _targets.add(target)
    try:
        yield
    finally:
        with _lock:
            _targets.discard(target)
            if not _targets:
                _switch_spawning(True)


_spawning = {name: getattr(subprocess, name) for name in ("_USE_VFORK", "_USE_POSIX_SPAWN")}


def _switch_spawning(on: bool) -> None:
    for name, usual in _spawning.items():
        setattr(subprocess, name, usual and on)


async def _in_thread(call: Callable[[], _T]) -> _T:
    """What ``call`` returns, which may wait for the disk. It starts also when all other threads wait for a mount."""
    return await trio.to_thread.run_sync(call, limiter=trio.CapacityLimiter(1))


async def _unmounted(session: Session, options: MountOptions, gone: trio.Event) -> bool:
    """Unmount while requests are served; false when somebody still uses the mount, or it cannot be unmounted."""
    if options.writeback and not options.read_only:
        await session.helper("sync")
    until = trio.current_time() + _LEAVING_S
    while await session.helper("unmount") == errno.EBUSY and trio.current_time() < until:
        await trio.sleep(_POLL_S)
    with trio.move_on_at(until):  # a copy in another mount namespace counts too
        await gone.wait()
    if not gone.is_set():
        _log.warning("%s", _still_used(session.mount_point() or "a mount that is out of sight"))
    return gone.is_set()


def _still_used(point: str) -> str:
    users = ", ".join(f"{user.name} (pid {user.pid}, {user.what})" for user in holders(point)[:5])
    return f"{point} is still used by {users or 'this program, or in another mount namespace'}; it is cut off"


def _take_down(target: str, minor: int, server: int | None) -> None:
    """Unmount what another process serves, and wait until that has written everything."""
    until = time.monotonic() + _LEAVING_S
    late = False
    while (point := _point_of(minor)) is not None:
        late = time.monotonic() > until
        if late:
            _log.warning("%s", _still_used(point))
            with contextlib.suppress(OSError):
                unmount.sync_mount(point)
        try:
            unmount.unmount(point, lazy=late)
        except OSError as error:
            if late or error.errno not in (errno.EBUSY, errno.EINVAL):  # EINVAL: somebody else was faster
                raise MountError(f"cannot unmount {target}: {error.strerror}; try: unionfs umount {target}") from None
            time.sleep(_POLL_S)
    if server is None:
        return
    if not late and has_ended(server, _LEAVING_S):
        return
    if not late and not is_mounted_anywhere(minor) and has_ended(server, _END_S):
        return
    # The first signal asks it to unmount, the second one to end, which it does within five seconds.
    for number, wait_s in ((signal.SIGTERM, 0.5), (signal.SIGTERM, 6.0), (signal.SIGKILL, 6.0)):
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(server, number)
        if has_ended(server, wait_s):
            return


def _point_of(minor: int) -> str | None:
    """Where the FUSE file system of this device minor can be reached."""
    on_top = {mount.mount_point: mount for mount in mounts.read_mounts()}
    return next((point for point, mount in on_top.items() if mount.is_union and mount.minor == minor), None)
