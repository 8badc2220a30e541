"""One FUSE session, on whichever transport: mount, serve until the last user is gone, unmount."""

from __future__ import annotations

import errno
import logging
import os
import signal
import time
from collections.abc import Callable, Mapping

import trio

from unionfs.errors import MountError
from unionfs.fuse_ops.options import MountOptions
from unionfs.fuse_ops.session import mount_registry
from unionfs.fuse_ops.transports.choice import Transport
from unionfs.host import mounts, unmount
from unionfs.host.processes import process_start

log = logging.getLogger(__name__)

# How long requests in progress may take to stop after the second signal.
_GRACE_S = 5
_ENDING_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def run_session(
    transport: Transport,
    options: MountOptions,
    target: str,
    *,
    ready: Callable[[], None],
    gone: Callable[[], None] = lambda: None,
    statistics: Callable[[], Mapping[str, object]] | None = None,
    supervised: bool = False,
) -> None:
    """Mount through ``transport`` on ``target`` and serve until the mount is gone.

    ``target`` is an absolute path without symbolic links. ``ready`` is called once the kernel has accepted the
    session, when every access to the mount is answered; ``gone`` as soon as the mount is gone, while something may
    still be written. SIGTERM and SIGINT unmount; the second one ends the session at once. However it ends, the mount is
    gone when this returns or raises. Raises MountError when it never came to be. ``supervised`` is for the record: this
    process is a copy of the supervisor.
    """
    session = Session(transport, options, target, ready, gone, statistics, supervised=supervised)
    # From the mount until somebody listens, a signal has to wait: its default is to die and leave a dead mount.
    signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING_SIGNALS)
    try:
        session.mount()
        try:
            session.run()
        finally:
            session.finish()
    finally:
        session.close()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _ENDING_SIGNALS)


class Session:
    """One mount: made, served by a trio program that runs already, unmounted, released. Signals are the caller's.

    Args:
        transport, options, target, ready, gone, statistics, supervised: as for :func:`run_session`.
    """

    def __init__(
        self,
        transport: Transport,
        options: MountOptions,
        target: str,
        ready: Callable[[], None],
        gone: Callable[[], None],
        statistics: Callable[[], Mapping[str, object]] | None = None,
        *,
        supervised: bool = False,
    ) -> None:
        self._transport = transport
        self._options = options
        self._target = target
        self._ready = ready
        self._call_gone = gone
        self._statistics = statistics
        self._supervised = supervised
        self._mount: mounts.Mount | None = None
        # Opened now, since the mount may cover them.
        self._record_place = mount_registry.RecordPlace()
        self._fusermount = unmount.open_fusermount()
        self._accepted = trio.Event()
        self._announced = False
        self._gone = False
        self._cancel_scope = trio.CancelScope()

    def mount(self) -> None:
        """Mount; from now on requests wait for :meth:`serve`. Raises MountError."""
        self._transport.mount(self._target)
        try:
            self._mount = _find_mount(self._target)
        except BaseException:
            self.finish()
            raise

    def run(self) -> None:
        """Serve in a trio program made for it, until the mount is gone. Signals are told to unmount."""
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        trio.run(self._main, restrict_keyboard_interrupt_to_checkpoints=True)
        if not self._announced:
            raise MountError(
                f"cannot mount on {self._target}: the session ended before it began; run with -d to see why"
            )

    @property
    def minor(self) -> int:
        """The minor number of the mount's device; 0 when the mount table cannot be read."""
        return 0 if self._mount is None else self._mount.minor

    def finish(self) -> None:
        """Release everything that may be left of a mount, after whatever kind of end. May be called again."""
        # Closing /dev/fuse first makes the kernel fail what it still waits for, so that unmounting cannot hang.
        self._transport.close()
        point = self.mount_point()
        if point is not None:
            status, said = unmount.start_helper("detach", point, self._fusermount).result()
            if status:
                log.warning("cannot unmount %s: %s", point, said or os.strerror(status))

    def close(self) -> None:
        """Give up what was opened before the mount."""
        self._record_place.close()
        if self._fusermount is not None:
            os.close(self._fusermount)

    async def _main(self) -> None:
        with self._cancel_scope:
            async with trio.open_nursery() as nursery:
                await nursery.start(self._handle_signals, nursery)
                await self.serve()
                nursery.cancel_scope.cancel()

    async def serve(self) -> None:
        """Answer requests until the mount is gone."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._announce)
            # The kernel's INIT is answered as soon as the callback returns, before any task runs again.
            await self._transport.serve(self._accepted.set, self._mount_is_gone)
            nursery.cancel_scope.cancel()

    def _mount_is_gone(self) -> None:
        self._gone = True
        self._call_gone()

    async def _announce(self) -> None:
        await self._accepted.wait()
        self._record()
        self._announced = True
        self._ready()

    async def _handle_signals(
        self, nursery: trio.Nursery, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        with trio.open_signal_receiver(*_ENDING_SIGNALS, signal.SIGUSR1) as signals:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _ENDING_SIGNALS)
            task_status.started()
            ending = False
            async for number in signals:
                if number == signal.SIGUSR1:
                    self._log_statistics()
                elif not ending:
                    ending = True
                    nursery.start_soon(self._unmount)
                else:
                    self._end_now()

    async def _unmount(self) -> None:
        """Unmount without losing anything; requests are served meanwhile."""
        if self._mount is None:
            log.error("this mount cannot be found, so it is not unmounted; ending without")
            self._cancel_scope.cancel()
            return
        if self.mount_point() is None:
            log.info("%s cannot be reached any more; serving until its last user is gone", self._target)
            return
        if self._options.writeback and not self._options.read_only:
            # Before a lazy unmount, which would leave written data with the kernel for as long as there are users.
            await self.helper("sync")
        status = await self.helper("unmount")
        if status == errno.EBUSY:
            log.info("%s is in use; it is out of sight, and served until its last user is gone", self._target)
            status = await self.helper("detach")
        if status not in (0, errno.EINVAL):  # EINVAL: unmounted by somebody else meanwhile
            log.error("cannot unmount %s; ending without", self._target)
            self._cancel_scope.cancel()

    def _end_now(self) -> None:
        log.warning("second signal: ending at once")
        # A request that will not stop must not keep us: the default action of SIGALRM ends the process.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(_GRACE_S)
        point = self.mount_point()
        if point is not None:
            # Nobody waits for it: it may itself wait for us to close /dev/fuse.
            unmount.start_helper("detach", point, self._fusermount)
        self._cancel_scope.cancel()

    async def helper(self, action: str) -> int:
        """Run ``action`` on our mount in another process and return its errno; see the module unmount."""
        point = self.mount_point()
        if point is None:
            return errno.EINVAL
        helper = unmount.start_helper(action, point, self._fusermount)
        await trio.lowlevel.wait_readable(helper.pidfd)
        status, said = helper.result()
        if status not in (0, errno.EBUSY):
            log.warning("%s of %s: %s", action, point, said or os.strerror(status))
        return status

    def mount_point(self) -> str | None:
        """The path by which our mount is reached, or None when there is none.

        It may have been moved meanwhile, and a path that another mount covers would unmount the other one. The kernel
        gives the id of a mount that is gone to the next one, so the device counts too: while we serve it, it is ours.
        """
        if self._mount is None or self._gone:
            return None
        ours = (self._mount.mount_id, self._mount.minor)
        on_top = {mount.mount_point: (mount.mount_id, mount.minor) for mount in mounts.read_mounts()}
        return next((point for point, ids in on_top.items() if ids == ours), None)

    def _record(self) -> None:
        if self._mount is None:
            return
        pid = os.getpid()
        options = self._options
        self._record_place.write(
            mount_registry.MountRecord(
                minor=self._mount.minor,
                target=self._mount.mount_point,
                pid=pid,
                started=process_start(pid) or 0,
                mounted_at=time.time(),
                source=options.source,
                lowerdirs=list(options.lowerdirs),
                datadirs=list(options.datadirs),
                upperdir=options.upperdir,
                workdir=options.workdir,
                options=list(options.fuse_options),
                transport=self._transport.name,
                supervised=self._supervised,
            )
        )

    def _log_statistics(self) -> None:
        counters = {} if self._statistics is None else self._statistics()
        log.info("counters: %s", " ".join(f"{name}={value}" for name, value in counters.items()) or "none")


def _find_mount(target: str) -> mounts.Mount | None:
    """The mount that was just made on ``target``, or whose /dev/fuse was handed over as ``/dev/fd/N``."""
    if not target.startswith("/dev/fd/"):
        top = mounts.top_mount(target)
        return top if top is not None and top.is_union else None
    try:
        with open(f"/proc/self/fdinfo/{os.path.basename(target)}", encoding="ascii") as lines:
            minor = next(int(line.split()[1]) for line in lines if line.startswith("fuse_connection:"))
    except (OSError, StopIteration):  # before Linux 6.16
        return None
    return next((mount for mount in mounts.read_mounts() if mount.minor == minor and mount.major == 0), None)
