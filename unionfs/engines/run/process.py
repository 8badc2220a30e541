"""The process of a container: who it is, what it runs, and whether that can be run there at all.

What the image says counts unless a person says otherwise. The rules for ``USER[:GROUP]`` are those of the OCI image
configuration's ``User`` and of Docker's ``--user``: names come from the container's own passwd and group files, numbers
need not be in them, and only a user without an explicit group gets supplementary groups.

Whether the kernel would start the command is found out before: a runtime reports some of these faults from inside of
the container, where they look like the command's own failure.
"""

from __future__ import annotations

import errno
import os
import posixpath
import stat
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from unionfs.engines.images.model import ImageConfig, Platform
from unionfs.engines.run.options import RunOptions
from unionfs.engines.run.rootfs import RootFs
from unionfs.errors import CommandNotExecutableError, CommandNotFoundError, RunError

DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

_MAX_ID = 2**31 - 1
_LIMIT_BYTES = 16 << 20  # no true passwd file is larger, and a hostile one does not fill our memory

_HEAD_BYTES = 4096  # enough for what a compiler puts in front; of a script's first line the kernel reads 256
_MAX_INTERPRETERS = 4  # of interpreters that are scripts themselves (linux/fs/exec.c: exec_binprm)
_BINFMT_MISC = "/proc/sys/fs/binfmt_misc"

_LITTLE, _BIG = 1, 2
_PT_INTERP = 3
# Byte order and e_machine of programs (elf(5), linux/elf-em.h) by Go's names.
_ELF_MACHINES = {
    "386": (_LITTLE, 3),
    "amd64": (_LITTLE, 62),
    "arm": (_LITTLE, 40),
    "arm64": (_LITTLE, 183),
    "loong64": (_LITTLE, 258),
    "ppc64le": (_LITTLE, 21),
    "riscv64": (_LITTLE, 243),
    "s390x": (_BIG, 22),
}
# What else a kernel runs.
_OLDER = {"amd64": "386", "arm64": "arm"}


@dataclass(frozen=True, slots=True)
class User:
    """Ids for a process.

    Attributes:
        groups: all that it is in, ``gid`` among them: files may be closed to a group, and leaving one is no way around
            that (CVE-2022-36109).
        home: for ``HOME``; ``/`` when the container does not say.
    """

    uid: int = 0
    gid: int = 0
    groups: tuple[int, ...] = (0,)
    home: str = "/"


def resolve_user(rootfs: RootFs, text: str) -> User:
    """The ids that ``text`` stands for in this container.

    Args:
        rootfs: the container's files.
        text: ``USER``, ``USER:GROUP`` or empty for root; each is a name or a number.

    Raises:
        RunError: a name that the container does not have, or a number that is none.
    """
    user_text, _, group_text = text.partition(":")
    user_text = user_text or "0"
    entry = _find_user(rootfs, user_text)
    if entry is not None:
        name, uid, gid, home = entry
    else:
        name, uid, gid, home = "", _number(user_text, "user", "/etc/passwd"), 0, "/"
    if group_text:
        gid = _find_group(rootfs, group_text)
        return User(uid, gid, (gid,), home)
    more = [number for _, number, members in _groups(rootfs) if name and name in members]
    return User(uid, gid, tuple(dict.fromkeys([gid, *more])), home)


def _find_user(rootfs: RootFs, text: str) -> tuple[str, int, int, str] | None:
    """(name, uid, gid, home); a name goes before an equal number."""
    by_number = None
    for fields in _lines(rootfs, "/etc/passwd", 6):
        if not (fields[2].isdecimal() and fields[3].isdecimal()):
            continue
        entry = fields[0], int(fields[2]), int(fields[3]), fields[5] or "/"
        if fields[0] == text:
            return entry
        if by_number is None and text.isdecimal() and entry[1] == int(text):
            by_number = entry
    return by_number


def _find_group(rootfs: RootFs, text: str) -> int:
    for name, number, _ in _groups(rootfs):
        if name == text:
            return number
    return _number(text, "group", "/etc/group")


def _groups(rootfs: RootFs) -> Iterator[tuple[str, int, list[str]]]:
    for fields in _lines(rootfs, "/etc/group", 3):
        if fields[2].isdecimal():
            yield fields[0], int(fields[2]), fields[3].split(",") if len(fields) > 3 else []


def _lines(rootfs: RootFs, path: str, least: int) -> Iterator[list[str]]:
    """The fields of each line that has enough of them; none if the file cannot be read."""
    try:
        text = rootfs.read(path, _LIMIT_BYTES).decode("utf-8", "surrogateescape")
    except OSError:
        return
    for line in text.split("\n"):
        fields = line.strip().split(":")
        if len(fields) >= least:
            yield fields


def _number(text: str, what: str, path: str) -> int:
    if text.isdecimal() and text.isascii() and int(text) <= _MAX_ID:
        return int(text)
    raise RunError(f"{what} {text[:100]}: the container's {path} does not have it; give a number (--user)")


@dataclass(frozen=True, slots=True)
class Process:
    """What is started.

    Attributes:
        args: the program and its arguments.
        env: ``NAME=value`` each, every name once.
        cwd: an absolute path in the container.
    """

    args: tuple[str, ...]
    env: tuple[str, ...]
    cwd: str
    user: User

    @property
    def search(self) -> str:
        """Where the program is looked for."""
        return _values(self.env).get("PATH", DEFAULT_PATH)


def arguments(config: ImageConfig, options: RunOptions) -> tuple[str, ...]:
    """The program and its arguments. As in Docker an entrypoint of one empty text is none.

    Raises:
        RunError: neither the image nor the person says what to run.
    """
    entrypoint = config.entrypoint if options.entrypoint is None else (options.entrypoint,)
    cmd = config.cmd if options.entrypoint is None else ()
    args = (*(entrypoint if entrypoint != ("",) else ()), *(options.command or cmd))
    if not args:
        raise RunError("the image does not say what to run; write a command after it")
    return args


def make_process(config: ImageConfig, options: RunOptions, user: User, hostname: str) -> Process:
    """Put together what is started as ``user``.

    Raises:
        RunError: there is nothing to run, or the working directory is no absolute path.
    """
    defaults = [f"PATH={DEFAULT_PATH}", f"HOSTNAME={hostname}", f"HOME={user.home}"]
    if options.terminal:
        defaults.append("TERM=xterm")
    env = tuple(f"{name}={value}" for name, value in _values([*defaults, *config.env, *options.env]).items())
    cwd = options.workdir or config.working_dir or "/"
    if not cwd.startswith("/"):
        raise RunError(f"working directory {cwd[:200]}: must be an absolute path in the container")
    return Process(arguments(config, options), env, posixpath.normpath(cwd), user)


def _values(env: Iterable[str]) -> dict[str, str]:
    """By name; the last one of a name counts. What is no ``NAME=value`` says nothing."""
    pairs = (variable.partition("=") for variable in env)
    return {name: value for name, equals, value in pairs if name and equals}


def foreign_machine(platform: Platform) -> str:
    """What to tell a person whose image is for another machine than this; empty if it is for this one."""
    here = Platform.of_this_machine()
    older = Platform(architecture=_OLDER.get(here.architecture, ""))
    if not platform.architecture or here.runs(platform) or older.runs(platform):
        return ""
    return f"the image is for {platform}, but this machine is {here}; its programs may not run here"


def check_command(rootfs: RootFs, command: str, search: str, cwd: str, hidden: Iterable[str]) -> None:
    """Raise if the kernel would not start ``command`` in this container.

    Args:
        rootfs: the container's files, without what will be mounted over them.
        command: the program as it was given.
        search: the container's ``PATH``.
        cwd: its working directory, from which relative paths count.
        hidden: where something will be mounted; what is there is not ours to judge.

    Raises:
        CommandNotFoundError: it is not there, or what should interpret it is not.
        CommandNotExecutableError: it is there and cannot be executed.
    """
    if not command:
        raise CommandNotFoundError("command not found: its name is empty; write one")
    places = [command] if "/" in command else [f"{where or '.'}/{command}" for where in search.split(":")]
    covers = tuple(posixpath.normpath(where).rstrip("/") for where in hidden)
    problem = ""
    for place in places:
        path = posixpath.normpath(posixpath.join(cwd, place))
        if _is_hidden(path, covers):
            return
        try:
            found = rootfs.stat(path)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR):
                problem = problem or f"{path}: {error.strerror}"
            continue
        if not stat.S_ISREG(found.st_mode):
            problem = problem or f"{path} is no program"
        elif not found.st_mode & 0o111:
            problem = problem or f"{path} has no x permission"
        else:
            _check_format(rootfs, path, covers)
            return
    if problem:
        raise CommandNotExecutableError(f"cannot execute {command[:200]}: {problem} in this image")
    where = "" if "/" in command else f" in PATH ({search})"
    raise CommandNotFoundError(f"command not found: {command[:200]}: it is not{where or ' there'} in this image")


def _is_hidden(path: str, covers: tuple[str, ...]) -> bool:
    return any(path == cover or path.startswith(cover + "/") for cover in covers)


def _check_format(rootfs: RootFs, path: str, covers: tuple[str, ...], depth: int = 0) -> None:
    head = rootfs.read(path, _HEAD_BYTES)
    if head.startswith(b"\x7fELF"):
        _check_elf(rootfs, path, head, covers)
        return
    if not head.startswith(b"#!"):
        if not _has_formats():
            raise CommandNotExecutableError(
                f"cannot execute {path}: neither a program nor a script that starts with #!"
            )
        return
    line = head[2:].split(b"\n")[0].split()
    interpreter = posixpath.normpath(os.fsdecode(line[0])) if line else ""
    if not interpreter.startswith("/") or _is_hidden(interpreter, covers):
        return
    try:
        found = rootfs.stat(interpreter)
    except OSError:
        raise CommandNotFoundError(
            f"command not found: {path} is a script for {interpreter}, not in this image"
        ) from None
    if stat.S_ISREG(found.st_mode) and depth < _MAX_INTERPRETERS:
        _check_format(rootfs, interpreter, covers, depth + 1)


def _check_elf(rootfs: RootFs, path: str, head: bytes, covers: tuple[str, ...]) -> None:
    here = Platform.of_this_machine().architecture
    own = {_ELF_MACHINES[name] for name in (here, _OLDER.get(here, "")) if name in _ELF_MACHINES}
    if len(head) < 20 or not own:
        return
    order = "<" if head[5] == _LITTLE else ">"
    machine = (head[5], struct.unpack_from(f"{order}H", head, 18)[0])
    if machine not in own:
        if not _has_formats():
            names = [name for name, known in _ELF_MACHINES.items() if known == machine]
            raise CommandNotExecutableError(
                f"cannot execute {path}: it is for {names[0] if names else 'another machine'}, but this machine is "
                f"{here}; use an image for {here}, or an emulator: apt install qemu-user-static"
            )
        return
    loader = _loader(head, order)
    if loader.startswith("/") and not _is_hidden(posixpath.normpath(loader), covers) and not rootfs.exists(loader):
        raise CommandNotFoundError(
            f"command not found: {path} was built for a system with {loader}, which is not in this image"
        )


def _loader(head: bytes, order: str) -> str:
    """The program that loads this one and its libraries; empty for none, and where the head does not tell."""
    wide = head[4] == 2
    try:
        start = struct.unpack_from(f"{order}{'Q' if wide else 'I'}", head, 32 if wide else 28)[0]
        size, count = struct.unpack_from(f"{order}HH", head, 54 if wide else 42)
        for number in range(count):
            at = start + number * size
            if struct.unpack_from(f"{order}I", head, at)[0] != _PT_INTERP:
                continue
            if wide:
                offset, length = (struct.unpack_from(f"{order}Q", head, at + skip)[0] for skip in (8, 32))
            else:
                offset, length = (struct.unpack_from(f"{order}I", head, at + skip)[0] for skip in (4, 16))
            text = head[offset : offset + length]
            return os.fsdecode(text.partition(b"\0")[0]) if len(text) == length else ""
    except struct.error:
        pass
    return ""


def _has_formats() -> bool:
    """Whether this machine was taught formats of programs beside its own (binfmt_misc)."""
    try:
        return bool(set(os.listdir(_BINFMT_MISC)) - {"register", "status"})
    except OSError:
        return False
