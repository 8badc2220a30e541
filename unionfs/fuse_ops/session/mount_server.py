"""Serving a mount as the command line of ``unionfs-mount`` says.

Its calling convention is fuse-overlayfs' own. Nothing heavy is imported before the command line is known to be right,
and nothing that only people need at all.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import re
import stat
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from unionfs import __version__
from unionfs.errors import MountError, OptionError, UnionfsError
from unionfs.fuse_ops.options import MountOptions
from unionfs.fuse_ops.session.option_text import parse_options, remount_options
from unionfs.fuse_ops.session.supervisor.client import DeclinedError
from unionfs.host import mounts
from unionfs.host.daemon import Ready, daemonize, inherited_fds, open_standard_fds
from unionfs.host.processes import file_size_limit, reset_signals, shed_limits, too_many_files

_USAGE = """\
usage: unionfs-mount [-f] [-d] -o OPTION[,OPTION...] [SOURCE] TARGET

Mounts a union of directories on TARGET and returns when it can be used.
SOURCE is the name that the mount table shows.

    -o lowerdir=TOP:...:BOTTOM   the read-only directories to stack
    -o upperdir=DIR              the directory that takes all changes; without it the mount is read-only
    -o workdir=DIR               needed with upperdir: an empty directory on the same file system
    -o OPTION                    others are described in docs/unionfs-mount.md
    -f                           stay in the foreground
    -d, --debug                  stay in the foreground and tell every request
    -h, --help                   print this
    -V, --version                print the versions
"""

# mount.fuse3 with drop_privileges mounts by itself and hands over the open /dev/fuse.
_HANDED_OVER = re.compile(r"/dev/fd/(\d+)\Z")


@dataclass(slots=True)
class _CommandLine:
    texts: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    foreground: bool = False
    debug: bool = False
    help: bool = False
    version: bool = False


def main(arguments: Sequence[str]) -> int:
    """Run the program with these arguments and return its exit status."""
    return _reported(lambda: _run(arguments), "UNIONFS_DEBUG" in os.environ, _say)


def serve_in_copy(arguments: Sequence[str], ready: Ready) -> int:
    """What a copy of the supervisor does: see :data:`unionfs.fuse_ops.session.supervisor.worker.Serve`."""

    def run() -> int:
        line = _read_command_line(arguments)
        if line.help or line.version or line.foreground or line.debug or remount_options(line.texts) is not None:
            raise DeclinedError("this needs a process of the caller's own")
        options, target = _prepare(line)
        return _serve(options, target, [], ready, supervised=True)

    return _reported(run, False, _say)


def _run(arguments: Sequence[str]) -> int:
    open_standard_fds()
    fds = inherited_fds()
    line = _read_command_line(arguments)
    if line.help:
        print(_USAGE, end="")
        return 0
    if line.version:
        print(_versions())
        return 0
    changed = remount_options(line.texts)
    if changed is not None:
        _remount(line, changed)
        return 0
    options, target = _prepare(line)
    handed_over = _HANDED_OVER.match(target)
    if handed_over:
        fds = [fd for fd in fds if fd != int(handed_over.group(1))]
    if line.foreground or options.debug:
        return _serve(options, target, fds, None)
    return daemonize(lambda ready: _serve(options, target, fds, ready))


def _prepare(line: _CommandLine) -> tuple[MountOptions, str]:
    """The options and the mount point that the command line names, checked, and this process made fit to serve."""
    if not line.names:
        raise OptionError("no mount point is given; usage: unionfs-mount -o OPTIONS [SOURCE] TARGET")
    if len(line.names) > 2:
        raise OptionError(
            f"{len(line.names)} names are given ({' '.join(line.names[:4])}), but only SOURCE and TARGET are "
            "expected; quote names with spaces"
        )
    *source, target = line.names
    if not target:
        raise OptionError("the mount point is empty; usage: unionfs-mount -o OPTIONS [SOURCE] TARGET")
    parsed = parse_options(line.texts, source[0] if source else None)
    options = replace(parsed.options, debug=parsed.options.debug or line.debug)
    if parsed.ignored:
        _say(f"unknown options are ignored: {','.join(parsed.ignored)}")
    if not os.path.exists("/proc/self/mountinfo"):
        _say("/proc is not mounted here; without it the mount cannot be listed nor unmounted on a signal")
    if not _HANDED_OVER.match(target):
        target = checked_target(target)

    shed_limits()
    largest = file_size_limit()
    if largest is not None and not options.read_only:
        _say(f"no file can become larger than {largest} bytes, which is this user's limit; see ulimit -Hf")
    reset_signals()
    os.umask(0)  # the kernel has applied the caller's already
    return options, target


def _remount(line: _CommandLine, options: Sequence[str]) -> None:
    """What ``mount -o remount,ro`` asks for: the kernel does it, and refuses changes, or no longer."""
    # Here, because few need them.
    from unionfs.fuse_ops.session import mount_registry
    from unionfs.fuse_ops.transports import mounting

    target = mounts.canonical(line.names[-1]) if line.names and line.names[-1] else ""
    mount = mounts.top_mount(target)
    if mount is None or not mount.is_union:
        raise MountError(
            f"cannot remount {target or 'nothing'}: no union is mounted there; see them with: unionfs mounts"
        )
    record = mount_registry.find(mount)
    asked = [option for option in options if option in ("ro", "rw")]
    if record is not None and "ro" in record.options and asked[-1:] == ["rw"]:
        raise MountError(
            f"cannot remount {target}: it was mounted read-only; unmount it and mount it anew, with an upper"
        )
    mounting.remount(mount, options)


def _serve(
    options: MountOptions, target: str, fds: Sequence[int], ready: Ready | None, *, supervised: bool = False
) -> int:
    """Open the layers and serve them until the mount is gone; ``ready`` makes a daemon of us."""

    in_background = False

    def serve() -> int:
        # Here and not at the top: these take most of the start-up time, and what they make stays for good, so
        # looking for garbage among it is time lost, now and later.
        gc.disable()
        from unionfs.fuse_ops.session import logs
        from unionfs.fuse_ops.session.assembly import open_tree
        from unionfs.fuse_ops.session.session import run_session
        from unionfs.fuse_ops.transports.choice import choose_transport

        gc.freeze()
        gc.enable()
        logs.to_stderr(options.debug)
        # From here on nothing is imported, and no path is named that the mount may cover.
        logs.read_no_files()
        system_log = logs.SystemLog()

        def become_daemon() -> None:
            nonlocal in_background
            if ready is not None:
                # What the caller left open, a lock or a pipe, must not live as long as the mount. Not earlier: a
                # layer may be named by such a descriptor.
                for fd in fds:
                    os.close(fd)
                ready()
                logs.to_system_log(system_log)
                in_background = True

        with contextlib.closing(system_log), contextlib.closing(open_tree(options)) as tree:
            for warning in tree.warnings:
                _say(warning)
            run_session(
                choose_transport(tree, options),
                options,
                target,
                ready=become_daemon,
                gone=tree.end_soon,
                statistics=getattr(tree, "statistics", None),
                supervised=supervised,
            )
        return 0

    def tell(text: str) -> None:
        if not in_background:
            _say(text)
        else:
            import logging  # loaded long ago

            logging.getLogger(__name__).error("%s", text)

    return _reported(serve, options.debug or "UNIONFS_DEBUG" in os.environ, tell)


def checked_target(target: str) -> str:
    """``target`` as an absolute path without links, known to be a directory that we can mount on.

    Raises:
        MountError: it is not, or a union is mounted there already.
    """
    path = mounts.canonical(target)
    if path == "/proc":
        raise MountError("mount point /proc: the server itself needs what is there; choose another")
    top = mounts.top_mount(path)
    if top is not None and top.is_union:
        raise MountError(_occupied(target, path))
    try:
        is_directory = stat.S_ISDIR(os.stat(path).st_mode)
    except FileNotFoundError:
        raise MountError(f"mount point {target} does not exist; create it with: mkdir -p {target}") from None
    except OSError as error:
        raise MountError(f"mount point {target} cannot be used: {error.strerror}; choose another") from None
    if not is_directory:
        raise MountError(f"mount point {target} is not a directory; name a directory")
    return path


def _occupied(target: str, path: str) -> str:
    from unionfs.host.mounts import is_dead  # a mount that goes well does not need it

    if is_dead(path):
        return (
            f"mount point {target} has a dead mount, whose server is gone; "
            f"remove it with: unionfs umount --lazy {target}"
        )
    return f"mount point {target} is busy: a union is mounted there; unmount it with: unionfs umount {target}"


def _read_command_line(arguments: Sequence[str]) -> _CommandLine:
    # Options may follow names, as mount.fuse3 writes them, and the value of -o may be glued to it.
    line = _CommandLine()
    rest = iter(arguments)
    for argument in rest:
        if argument == "--":
            line.names += rest
        elif argument == "-o":
            text = next(rest, None)
            if text is None:
                raise OptionError("-o is the last argument; write the mount options after it")
            line.texts.append(text)
        elif argument.startswith("-o"):
            line.texts.append(argument[2:])
        elif argument == "-f":
            line.foreground = True
        elif argument in ("-d", "--debug"):
            line.debug = True
        elif argument in ("-h", "--help"):
            line.help = True
        elif argument in ("-V", "--version"):
            line.version = True
        elif argument == "-s":
            pass  # libfuse's "single thread"; requests are served by one already
        elif argument.startswith("-") and argument != "-":
            raise OptionError(f"unknown option {argument}; see unionfs-mount --help")
        else:
            line.names.append(argument)
    return line


def _versions() -> str:
    import ctypes
    from importlib.metadata import PackageNotFoundError, version
    from importlib.util import find_spec

    spec = find_spec("unionfs.fuse_ops.union.union_tree")
    compiled = "" if spec is None or (spec.origin or "").endswith(".py") else " (compiled)"
    lines = [f"unionfs-mount: version {__version__}{compiled}"]
    try:
        lines.append(f"pyfuse3 version: {version('pyfuse3')}")
    except PackageNotFoundError:
        lines.append("pyfuse3 version: not installed; transport=direct only")
    for name in ("libfuse3.so.4", "libfuse3.so.3"):
        try:
            package_version = ctypes.CDLL(name).fuse_pkgversion
        except (OSError, AttributeError):
            continue
        package_version.restype = ctypes.c_char_p
        lines.append(f"FUSE library version: {package_version().decode()}")
        break
    else:
        lines.append("FUSE library version: unknown")
    lines.append(f"kernel version: {os.uname().release}")
    return "\n".join(lines)


def _reported(run: Callable[[], int], debug: bool, tell: Callable[[str], None]) -> int:
    """Run ``run``; whatever it raises becomes one line and the exit status 1."""
    try:
        return run()
    except KeyboardInterrupt:
        return 130
    except DeclinedError:
        raise
    except Exception as error:
        if debug:
            import traceback

            traceback.print_exc()
        tell(_in_words(error))
        return 1


def _in_words(error: BaseException) -> str:
    while isinstance(error, BaseExceptionGroup):  # of trio's nurseries, with one exception as a rule
        error = error.exceptions[0]
    if isinstance(error, UnionfsError):
        return str(error)
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        return too_many_files(error)
    if isinstance(error, OSError):
        where = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
        return f"{where}{error.strerror or error}; run with -d to see where"
    return f"internal error: {type(error).__name__}: {error}; run with -d to see where, and report it"


def _say(text: str) -> None:
    # One line whatever the names in it contain.
    print(f"unionfs-mount: {text}".replace("\n", "\\n"), file=sys.stderr)
