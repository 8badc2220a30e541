"""Mounting through the union file system's own program, one server process for each mount.

The server is a daemon: it outlives the process that asked for it, as containers do.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import time

from unionfs.drivers.layered import Stack
from unionfs.errors import MountError
from unionfs.fuse_ops.options import escape_value, format_layers
from unionfs.fuse_ops.session import mount_registry
from unionfs.fuse_ops.session.mount_registry import MountRecord
from unionfs.fuse_ops.session.supervisor import client as supervisor
from unionfs.host import mountinfo, mounts, unmount
from unionfs.host.processes import has_ended, open_process
from unionfs.host.selinux import mount_context

_log = logging.getLogger(__name__)

# A server that is unmounted has nothing left to do but to write back; one that does not end is stuck.
_END_S = 30.0
_SETTLE_S = 2.0
_POLL_S = 0.005


class FuseMounter:
    """A :class:`unionfs.drivers.layered.Mounter` that runs ``unionfs-mount``.

    Args:
        options: further words for ``-o``.
    """

    def __init__(self, options: tuple[str, ...] = ()) -> None:
        self._options = options

    def mount(self, stack: Stack) -> None:
        """See :meth:`Mounter.mount`."""
        words = ["lowerdir=" + format_layers(stack.lowers)]
        if stack.upper is not None and stack.work is not None:
            words += ["upperdir=" + escape_value(stack.upper), "workdir=" + escape_value(stack.work)]
        context = mount_context(stack.mount_label)
        if context is not None:
            words.append(f'context="{context}"')
        if stack.size_bytes:
            words.append(f"quota={stack.size_bytes}")
        words += self._options
        status, output = _mount(["-o", ",".join(words), stack.target])
        said = " ".join(output.decode(errors="replace").split())
        if status != 0:
            raise MountError(said.removeprefix("unionfs-mount: ") or f"cannot mount {stack.target}: see the system log")
        if said:
            _log.warning("%s: %s", stack.target, said)

    def take_down(self, target: str, *, lazy: bool) -> None:
        """See :meth:`Mounter.take_down`."""
        server = _server_of(target)
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
        point = mountinfo.top_mount(target)
        unmount.sync_mount(target)
        # Before Linux 6.16, syncfs(2) on FUSE does not wait for the writes that it has started; the kernel counts them.
        if point is not None:
            _wait_for_requests(point.minor)


def _mount(words: list[str]) -> tuple[int, bytes]:
    """Run unionfs-mount with ``words``, or have the supervisor serve that; the exit status and what it said."""
    # -P: nothing is to be imported from whatever directory we are started in.
    command = [sys.executable, "-P", "-m", "unionfs.cli.mount_program", *words]
    with contextlib.ExitStack() as opened:
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        opened.callback(os.close, null)
        said = os.memfd_create("unionfs-mount", os.MFD_CLOEXEC)  # not a pipe, which would have to be read meanwhile
        opened.callback(os.close, said)
        status = supervisor.mount(words, command, os.environb, (null, null, said))
        if status is not None:
            return status, os.pread(said, os.fstat(said).st_size, 0)
    done = subprocess.run(
        command, cwd="/", stdin=subprocess.DEVNULL, capture_output=True, check=False, start_new_session=True
    )
    return done.returncode, done.stderr


def _wait(target: str, server: MountRecord, ended: int) -> None:
    """Wait for the end of a server whose mount is gone here; kill one that does not end though nobody uses it."""
    used = mounts.is_mounted_anywhere(server.minor)
    if used and mountinfo.is_mounted_here(server.minor):
        return  # bound to other places too
    if not used and has_ended(ended, _END_S):
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


def _server_of(target: str) -> MountRecord | None:
    """What the server of the mount at ``target`` said of itself; None if it did not, or if it is another mount."""
    mount = mountinfo.top_mount(target)
    return mount_registry.find(mount.minor) if mount is not None and mount.is_union else None


def _wait_for_requests(minor: int) -> None:
    """Wait until the server has answered what it was asked, for a short time: it may be asked all the while."""
    deadline = time.monotonic() + _SETTLE_S
    while time.monotonic() < deadline and mounts.waiting_requests(minor):
        time.sleep(_POLL_S)
