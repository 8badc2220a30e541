"""The runtime configuration (``config.json``) from which crun or runc makes a container, and the files it shows there.

Format: OCI runtime specification 1.0, config.md and config-linux.md.
"""

from __future__ import annotations

import os
from typing import Any, Literal

from unionfs.engines.run.options import RunOptions
from unionfs.engines.run.privileges import DEFAULT_CAPABILITIES, held_capabilities, seccomp_profile
from unionfs.engines.run.process import Process

INIT_PATH = "/dev/init"
"""Where the process 1 of :attr:`RunOptions.init` is shown; below ``/dev`` it needs no file in the image."""

HOST_FILES = ("hosts", "hostname", "resolv.conf")
"""What belongs to the machine that a container runs on; mounted over those in its ``/etc``."""

_LOCALHOST = "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n"

# The kernel's files that tell about the host or change it, and that no namespace covers.
_MASKED_PATHS = (
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/sys/devices/virtual/powercap",
    "/sys/firmware",
)
_READ_ONLY_PATHS = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")

_SAFE = ("nosuid", "noexec", "nodev")
_PERIOD_US = 100_000  # cgroups' own default (cpu.cfs_period_us)
_TTY_GROUP = 5  # of devpts(5); the same in every distribution


def build_spec(
    process: Process,
    options: RunOptions,
    *,
    rootfs: str,
    files: str,
    hostname: str,
    init: str = "",
    window: os.terminal_size | None = None,
    rootless: bool = False,
) -> dict[str, Any]:
    """The configuration of one container.

    Args:
        process: what is started.
        options: what a person asked for.
        rootfs: the mounted root file system.
        files: the directory with :data:`HOST_FILES`.
        hostname: the container's.
        init: the program that becomes process 1; empty for none.
        window: the size of the terminal.
        rootless: we are root of a user namespace only.
    """
    namespaces = ["pid", "mount", "ipc", "uts", "cgroup", *(["network"] if options.network == "none" else [])]
    linux: dict[str, Any] = {
        "namespaces": [{"type": name} for name in namespaces],
        "maskedPaths": list(_MASKED_PATHS),
        "readonlyPaths": list(_READ_ONLY_PATHS),
        # The runtime itself adds the devices that every container has: null, zero, full, random, urandom, tty, ptmx.
        "resources": {"devices": [{"allow": False, "access": "rwm"}], **_limits(options)},
        "rootfsPropagation": "rslave",
    }
    if options.seccomp:
        linux["seccomp"] = seccomp_profile()
    return {
        "ociVersion": "1.0.0",
        "hostname": hostname,
        "root": {"path": rootfs, "readonly": options.read_only},
        "process": build_process(process, options, init, window),
        "mounts": _mounts(options, files, init, rootless),
        "linux": linux,
    }


def _limits(options: RunOptions) -> dict[str, Any]:
    limits: dict[str, Any] = {}
    if options.memory_bytes:
        limits["memory"] = {"limit": options.memory_bytes}
    if options.cpus:
        limits["cpu"] = {"period": _PERIOD_US, "quota": int(options.cpus * _PERIOD_US)}
    if options.pids_limit:
        limits["pids"] = {"limit": options.pids_limit}
    return limits


def build_process(
    process: Process, options: RunOptions, init: str = "", window: os.terminal_size | None = None
) -> dict[str, Any]:
    """The description of one process.

    Args:
        process: what is started.
        options: what a person asked for.
        init, window: see :func:`build_spec`.
    """
    wanted = DEFAULT_CAPABILITIES if options.capabilities is None else options.capabilities
    possible = held_capabilities()
    names = [f"CAP_{name}" for name in wanted if name in possible]
    # Only root has them from the start; another user gets them from setuid programs and file capabilities.
    own = names if process.user.uid == 0 else []
    return {
        "terminal": options.terminal,
        **({"consoleSize": {"height": window.lines, "width": window.columns}} if window is not None else {}),
        "args": [*([INIT_PATH, "--"] if init else []), *process.args],
        "env": list(process.env),
        "cwd": process.cwd,
        "user": {
            "uid": process.user.uid,
            "gid": process.user.gid,
            "additionalGids": list(process.user.groups),
            "umask": 0o022,
        },
        "capabilities": {"bounding": names, "effective": own, "permitted": own},
        "noNewPrivileges": not options.new_privileges,
    }


def _mounts(options: RunOptions, files: str, init: str, rootless: bool) -> list[dict[str, Any]]:
    found = [
        _mount("/proc", "proc", *_SAFE),
        _mount("/dev", "tmpfs", "nosuid", "strictatime", "mode=755", "size=65536k"),
        _mount(
            "/dev/pts", "devpts", "nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", f"gid={_TTY_GROUP}"
        ),
        _mount("/dev/shm", "tmpfs", *_SAFE, "mode=1777", "size=65536k", source="shm"),
        _mount("/dev/mqueue", "mqueue", *_SAFE),
    ]
    if rootless and options.network == "host":
        # The kernel mounts sysfs only for the owner of the network namespace that it shows.
        found.append(_bind("/sys", "/sys", read_only=True, extra=_SAFE))
    else:
        found.append(_mount("/sys", "sysfs", *_SAFE, "ro"))
        found.append(_mount("/sys/fs/cgroup", "cgroup", *_SAFE, "relatime", "ro"))
    for name in HOST_FILES:
        found.append(_bind(os.path.join(files, name), f"/etc/{name}", read_only=options.read_only))
    if init:
        found.append(_bind(init, INIT_PATH, read_only=True))
    # In the order of depth, so that one does not hide another that lies in it.
    own = [
        *(_mount(one.destination, "tmpfs", "nosuid", "nodev", *one.options) for one in options.tmpfs),
        *(_bind(one.source, one.destination, one.read_only) for one in options.volumes),
    ]
    return found + sorted(own, key=lambda mount: mount["destination"].count("/"))


def _mount(destination: str, kind: str, *options: str, source: str = "") -> dict[str, Any]:
    return {"destination": destination, "type": kind, "source": source or kind, "options": list(options)}


def _bind(source: str, destination: str, read_only: bool, extra: tuple[str, ...] = ()) -> dict[str, Any]:
    # rslave: what is unmounted on the host is let go of here too, so that a container does not keep another one's
    # file system alive.
    options = ["rbind", "rslave", "ro" if read_only else "rw", *extra]
    return {"destination": destination, "type": "bind", "source": source, "options": options}


def mount_points(options: RunOptions) -> tuple[list[str], list[str]]:
    """(directories, files) that have to be in the root file system for the mounts of :func:`build_spec`."""
    directories = ["/proc", "/dev", "/sys", "/etc", *(one.destination for one in options.tmpfs)]
    files = [f"/etc/{name}" for name in HOST_FILES]
    for volume in options.volumes:
        (directories if volume.name or os.path.isdir(volume.source) else files).append(volume.destination)
    return directories, files


def write_host_files(directory: str, hostname: str, network: Literal["host", "none"]) -> None:
    """Write the files of :data:`HOST_FILES`.

    Args:
        directory: where to.
        hostname: the container's.
        network: with the host's, its names and name servers count in the container too.

    Raises:
        OSError: they cannot be written.
    """
    shared = network == "host"
    hosts = (_host_file("/etc/hosts") if shared else b"") or _LOCALHOST.encode()
    if not hosts.endswith(b"\n"):
        hosts += b"\n"
    _write(directory, "hosts", hosts + f"127.0.1.1\t{hostname}\n".encode())
    _write(directory, "hostname", f"{hostname}\n".encode())
    _write(directory, "resolv.conf", _host_file("/etc/resolv.conf") if shared else b"")


def _host_file(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError:
        return b""


def _write(directory: str, name: str, contents: bytes) -> None:
    with open(os.path.join(directory, name), "wb") as file:
        os.fchmod(file.fileno(), 0o644)
        file.write(contents)
