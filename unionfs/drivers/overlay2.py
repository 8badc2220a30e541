"""The ``overlay2`` driver: the kernel's overlayfs over Docker's home layout.

Docker's own driver of that name and this one can open each other's homes (not at the same time). How the kernel's
overlayfs is mounted, and what it does on this host, follows the driver.

Sources: mount(2), Documentation/filesystems/overlayfs.rst.
"""

from __future__ import annotations

import errno
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import NamedTuple

from unionfs.archive.idmapping import IdMapping
from unionfs.drivers.contract import CREATING
from unionfs.drivers.layered import LayeredDriver, SizeLimits, Stack
from unionfs.drivers.overlay_home import OverlayHome
from unionfs.drivers.quota import NoQuota, project_limits
from unionfs.drivers.storage_options import parse_options
from unionfs.errors import IncompatibleFilesystemError, MountError, PrerequisitesError, QuotaNotSupportedError
from unionfs.fuse_ops.session.option_text import escape_value, format_layers, parse_size
from unionfs.host import syscalls, unmount
from unionfs.host.fs_magic import fs_magic, fs_name
from unionfs.host.selinux import mount_context
from unionfs.host.syscalls import in_user_namespace

_OPTIONS = ("overlay2.size", "overlay2.override_kernel_check")


def init(root: str, options: Sequence[str], id_mapping: IdMapping) -> Overlay2Driver:
    """Make the driver with its home at ``root`` (an :data:`unionfs.drivers.contract.InitFunc`).

    Option: ``overlay2.size`` (limit for container layers without one of their own; needs xfs with pquota).
    ``overlay2.override_kernel_check`` is accepted and has no effect: the kernel is tried, not its version looked at.

    Raises:
        PrerequisitesError: this kernel has no overlayfs, or we may not mount it.
        IncompatibleFilesystemError: overlayfs cannot use the file system of ``root``.
    """
    given = parse_options(options, _OPTIONS, "overlay2")
    layers = OverlayHome(root, id_mapping)
    facts = probe(layers.root)
    size = parse_size(given.get("overlay2.size", "0"))
    limits = project_limits(layers.root)
    if size:
        limits.check()
    return Overlay2Driver(layers, facts, id_mapping, limits, size)


def look(root: str, options: Sequence[str], id_mapping: IdMapping) -> Overlay2Driver:
    """The driver to look at a home with (a :data:`unionfs.drivers.contract.LookFunc`); options are as for init."""
    parse_options(options, _OPTIONS, "overlay2")
    # The kernel is not tried. Since Linux 4.8 an upper directory holds exactly what was changed.
    facts = OverlayFacts(supports_d_type=True, metacopy=False, native_diff=True, userxattr=False)
    limits = NoQuota(QuotaNotSupportedError("the store is opened to be read only"))
    return Overlay2Driver(OverlayHome(root, id_mapping), facts, id_mapping, limits, 0, read_only=True)


class Overlay2Driver(LayeredDriver):
    """See :func:`init`."""

    def __init__(
        self,
        layers: OverlayHome,
        facts: OverlayFacts,
        id_mapping: IdMapping,
        limits: SizeLimits,
        default_size_bytes: int,
        *,
        read_only: bool = False,
    ) -> None:
        self._facts = facts
        super().__init__(
            "overlay2",
            layers,
            KernelMounter(),
            limits,
            id_mapping,
            default_size_bytes=default_size_bytes,
            native_diff=facts.native_diff,
            read_only=read_only,
        )

    def status(self) -> list[tuple[str, str]]:
        """See :meth:`ProtoDriver.status`; the keys are Docker's."""
        return [
            ("Backing Filesystem", fs_name(fs_magic(self._layers.root))),
            ("Supports d_type", _word(self._facts.supports_d_type)),
            ("Using metacopy", _word(self._facts.metacopy)),
            ("Native Overlay Diff", _word(self._facts.native_diff)),
            ("userxattr", _word(self._facts.userxattr)),
        ]


def _word(value: bool) -> str:
    return "true" if value else "false"


_PARAMETERS = "/sys/module/overlay/parameters"
_DT_UNKNOWN = 0
_D_TYPE_OFFSET = 18  # in struct linux_dirent64


class KernelMounter:
    """A :class:`unionfs.drivers.layered.Mounter` for the kernel's overlayfs."""

    def __init__(self) -> None:
        self._words = _default_words()

    def mount(self, stack: Stack) -> None:
        """See :meth:`Mounter.mount`.

        mount(2) takes one page of options. A longer text is written with paths relative to the home, which the
        short links exist for.
        """
        limit = os.sysconf("SC_PAGESIZE") - 1
        text = self._text(stack, lambda path: path)
        directory = None
        if len(text) > limit:
            directory = stack.home
            text = self._text(stack, lambda path: os.path.relpath(path, stack.home))
            if len(text) > limit:
                raise MountError(
                    f"cannot mount {stack.target}: the options have {len(text)} bytes and the kernel takes {limit}; "
                    f"use fewer layers or a shorter mount label ({len(stack.mount_label)} bytes)"
                )
        try:
            mount_overlay(stack.target, text, directory)
        except OSError as error:
            raise MountError(
                f"cannot mount {stack.target}: {error.strerror}; see the kernel log (dmesg) for the reason"
            ) from error

    def take_down(self, target: str, *, lazy: bool) -> None:
        """See :meth:`Mounter.take_down`."""
        unmount.take_down(target, lazy=lazy)

    def settle(self, target: str) -> None:
        """See :meth:`Mounter.settle`: the kernel's overlayfs has no cache of its own for written data."""

    def _text(self, stack: Stack, shown: Callable[[str], str]) -> str:
        words = [*self._words, "lowerdir=" + format_layers(shown(path) for path in stack.lowers)]
        if stack.upper is not None and stack.work is not None:
            words.append("upperdir=" + escape_value(shown(stack.upper)))
            words.append("workdir=" + escape_value(shown(stack.work)))
        context = mount_context(stack.mount_label)
        if context is not None:
            words.append(f'context="{context}"')
        return ",".join(words)


def mount_overlay(target: str, options: str, directory: str | None = None) -> None:
    """Mount an overlay on ``target``; relative paths in ``options`` are taken from ``directory``.

    Raises:
        OSError: the kernel refused.
    """
    failure: list[OSError] = []

    def run() -> None:
        try:
            if directory is not None:
                # A thread with a working directory of its own: that of the process is everybody's.
                syscalls.unshare(syscalls.CLONE_FS)
                os.chdir(directory)
            syscalls.mount("overlay", target, b"overlay", 0, os.fsencode(options))
        except OSError as error:
            failure.append(error)

    if directory is None:
        run()
    else:
        thread = threading.Thread(target=run, name="mount")
        thread.start()
        thread.join()
    if failure:
        raise failure[0]


class OverlayFacts(NamedTuple):
    """What the kernel's overlayfs does on the file system that was tried."""

    supports_d_type: bool
    metacopy: bool
    """It copies metadata alone when only that changes, unless told otherwise."""
    native_diff: bool
    """An upper directory holds exactly what was changed (before Linux 4.8, a copied directory could turn opaque)."""
    userxattr: bool


def probe(directory: str) -> OverlayFacts:
    """Mount a small overlay in ``directory`` and see.

    Raises:
        PrerequisitesError: this kernel has no overlayfs, or we may not mount it.
        IncompatibleFilesystemError: overlayfs cannot use the file system of ``directory``.
    """
    userxattr = "userxattr" in _default_words()
    prefix = "user.overlay." if userxattr else "trusted.overlay."
    where = tempfile.mkdtemp(prefix="check-overlayfs-support", suffix=CREATING, dir=directory)
    try:
        for name in ("low2/d", "low1/d", "upper", "work", "merged"):
            os.makedirs(f"{where}/{name}")
        with open(f"{where}/low2/f", "w", encoding="ascii") as file:
            file.write("data")
        try:
            os.setxattr(f"{where}/low1/d", prefix + "opaque", b"y")
        except OSError as error:
            raise IncompatibleFilesystemError(
                f"{directory}: its file system ({fs_name(fs_magic(directory))}) takes no extended attributes "
                f"({error.strerror}); use ext4, xfs or btrfs"
            ) from error
        with _mounted(where, directory):
            os.mkdir(f"{where}/merged/d/new")
            os.chmod(f"{where}/merged/f", 0o600)
        opaque = _has_xattr(f"{where}/upper/d", prefix + "opaque")
        metacopy = _has_xattr(f"{where}/upper/f", prefix + "metacopy")
        return OverlayFacts(_supports_d_type(where), metacopy, not opaque, userxattr)
    finally:
        shutil.rmtree(where, ignore_errors=True)


@contextmanager
def _mounted(where: str, directory: str) -> Iterator[None]:
    stack = Stack(
        home=where,
        target=f"{where}/merged",
        lowers=(f"{where}/low1", f"{where}/low2"),
        upper=f"{where}/upper",
        work=f"{where}/work",
    )
    try:
        KernelMounter().mount(stack)
    except MountError as error:
        cause = error.__cause__
        number = cause.errno if isinstance(cause, OSError) else None
        if number == errno.ENODEV:
            raise PrerequisitesError("this kernel has no overlayfs; load it with: modprobe overlay") from error
        if number in (errno.EPERM, errno.EACCES):
            raise PrerequisitesError("mounting overlayfs is not permitted; run as root") from error
        raise IncompatibleFilesystemError(
            f"{directory}: overlayfs cannot be used on its file system ({fs_name(fs_magic(directory))}); "
            "use ext4, xfs or btrfs"
        ) from error
    try:
        yield
    finally:
        with suppress(OSError):
            unmount.unmount(stack.target, lazy=True)


def _default_words() -> list[str]:
    words = []
    if os.path.exists(f"{_PARAMETERS}/index"):
        words.append("index=off")  # a layer may be mounted several times, and copied to another disk
    if in_user_namespace():
        words.append("userxattr")
    elif _parameter("redirect_always_follow") == "N" and _parameter("redirect_dir") == "N":
        words.append("redirect_dir=follow")  # layers that were written through our own file system have them
    return words


def _parameter(name: str) -> str:
    try:
        with open(f"{_PARAMETERS}/{name}", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return ""


def _has_xattr(path: str, name: str) -> bool:
    try:
        os.getxattr(path, name, follow_symlinks=False)
    except OSError:
        return False
    return True


def _supports_d_type(directory: str) -> bool:
    """Whether reading a directory tells the type of each entry, which overlayfs needs to find whiteouts."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        entries = syscalls.directory_entries(fd, 4096)
        at = 0
        while at < len(entries):
            if entries[at + _D_TYPE_OFFSET] == _DT_UNKNOWN:
                return False
            at += int.from_bytes(entries[at + 16 : at + 18], sys.byteorder)
        return True
    finally:
        os.close(fd)
