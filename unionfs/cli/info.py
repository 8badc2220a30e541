"""``unionfs info``: what this machine lets unionfs do, and why not more."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

import click

from unionfs import __version__
from unionfs.cli.layer_output import human_size, json_option, print_json, print_table, store_options

if TYPE_CHECKING:
    from unionfs.fuse_ops.transports.kernel_offer import KernelOffer

_FUSE_SETTINGS = "/sys/module/fuse/parameters"


@dataclass(frozen=True, slots=True)
class Fact:
    """One line of the list.

    Attributes:
        name: what it is about.
        value: a word or two.
        why: the reason, or what to do about it.
    """

    name: str
    value: str
    why: str = ""


@click.command()
@json_option
@store_options
def info(root: str | None, driver: str, as_json: bool) -> None:
    """Show what this machine lets unionfs do, and why not more. Changes nothing."""
    facts = [*_of_mounts(), *_of_users(), *_of_containers(), *_of_the_store(root, driver)]
    if as_json:
        print_json({_key(fact.name): {"value": fact.value, "why": fact.why} for fact in facts})
        return
    print_table(("WHAT", "VALUE", "WHY"), [(fact.name, fact.value, fact.why) for fact in facts])


def _key(name: str) -> str:
    """``name`` as a word: ``FUSE over io_uring`` is ``fuse_over_io_uring``."""
    return re.sub(r"\W+", "_", name.lower()).strip("_")


def _of_mounts() -> Iterator[Fact]:
    from unionfs.errors import MountError
    from unionfs.fuse_ops.transports.choice import transport_for
    from unionfs.fuse_ops.transports.kernel_offer import ask_kernel

    yield Fact("unionfs", __version__, "compiled" if _is_compiled() else "not compiled: slower; see UNIONFS_COMPILE")
    yield Fact("kernel", os.uname().release)
    offer: KernelOffer | None = None
    try:
        offer = ask_kernel()
    except MountError as error:
        yield Fact("FUSE", "cannot be used", str(error))
    else:
        yield Fact("FUSE", ".".join(map(str, offer.version)))
    transport, why = transport_for("auto")
    if transport == "pyfuse3" and find_spec("pyfuse3") is None:
        why += ", but the package pyfuse3 is missing; install unionfs[pyfuse3]"
    yield Fact("transport", transport, why)
    yield _passthrough(offer, transport)
    yield _fuse_over_io_uring(offer)
    yield _reading_ahead()
    yield _protection()
    yield _supervisor()


def _is_compiled() -> bool:
    spec = find_spec("unionfs.fuse_ops.union.union_tree")
    return spec is not None and not (spec.origin or "").endswith(".py")


def _passthrough(offer: KernelOffer | None, transport: str) -> Fact:
    from unionfs.fuse_ops.transports.direct.protocol import Init
    from unionfs.host.processes import CAP_SYS_ADMIN, has_capability

    if transport != "direct":
        why = "only the transport direct has it"
    elif offer is None:
        why = "what the kernel offers is not known"
    elif not offer.has(Init.PASSTHROUGH):
        why = "this kernel does not offer it; Linux 6.9 does, built with CONFIG_FUSE_PASSTHROUGH"
    elif not has_capability(CAP_SYS_ADMIN):
        why = "the kernel grants it to root of the machine only (CAP_SYS_ADMIN), not in a user namespace"
    else:
        return Fact("passthrough", "yes", "files of the upper directory are read and written without the server")
    return Fact("passthrough", "no", why)


def _fuse_over_io_uring(offer: KernelOffer | None) -> Fact:
    from unionfs.fuse_ops.transports.direct.protocol import Init

    setting = _setting("enable_uring")
    if offer is not None and offer.has(Init.OVER_IO_URING):
        state = "this kernel offers it"
    elif setting == "N":
        state = f"this kernel has it switched off ({_FUSE_SETTINGS}/enable_uring)"
    else:
        state = "this kernel does not offer it"
    return Fact("FUSE over io_uring", "not used", f"{state}; requests are read from /dev/fuse")


def _setting(name: str) -> str:
    try:
        with open(f"{_FUSE_SETTINGS}/{name}", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return ""


def _reading_ahead() -> Fact:
    from unionfs.host.io_uring import LookupRing

    try:
        LookupRing().close()
    except OSError as error:
        return Fact("reading ahead", "no", f"io_uring: {error.strerror}; cold directories are slower")
    return Fact("reading ahead", "yes", "cold directories are read ahead by io_uring")


def _protection() -> Fact:
    from unionfs.host.syscalls import clone_mount_read_only

    try:
        os.close(clone_mount_read_only("/"))
    except OSError as error:
        why = f"{error.strerror}: no read-only clone of a mount can be made (Linux 5.12, root or a user namespace)"
        return Fact("layers are protected", "by our code only", why)
    return Fact("layers are protected", "by the kernel", "through a read-only clone of their mount")


def _supervisor() -> Fact:
    from unionfs.fuse_ops.session.supervisor.client import socket_paths

    found = [os.fsdecode(path) for path in socket_paths(os.environb) if os.path.exists(path)]
    if found:
        return Fact("supervisor", "listens", found[0])
    return Fact("supervisor", "none", "each mount starts a server of its own; unionfs serve supervisor keeps one ready")


def _of_users() -> Iterator[Fact]:
    from unionfs.engines.run.user_namespace import is_rootless, why_not_inside
    from unionfs.host.unmount import fusermount_path

    yield Fact("user", str(os.geteuid()), "root of a user namespace" if is_rootless() else "")
    if not os.path.exists("/dev/fuse"):
        yield Fact("/dev/fuse", "missing", "load the kernel module: modprobe fuse")
    elif os.access("/dev/fuse", os.R_OK | os.W_OK, effective_ids=True):
        everybody = os.stat("/dev/fuse").st_mode & 0o006 == 0o006
        yield Fact("/dev/fuse", "open", "to everybody" if everybody else "to this user, not to everybody")
    else:
        yield Fact("/dev/fuse", "closed", "to this user; scripts/setup --open-fuse opens it until the next boot")
    program = fusermount_path()
    yield Fact("fusermount3", program or "missing", "" if program else "ordinary users cannot mount; install fuse3")
    why = why_not_inside()
    who = "users with ranges in /etc/subuid" if os.geteuid() == 0 else "this user"
    yield Fact("rootless", "no" if why else "yes", why or f"{who} can be root of a user namespace")


def _of_containers() -> Iterator[Fact]:
    from unionfs.engines.run.cgroups import limits_here
    from unionfs.engines.run.runtime import find_runtime
    from unionfs.engines.run.user_namespace import is_rootless
    from unionfs.errors import RunError

    rootless = os.geteuid() != 0 or is_rootless()
    try:
        runtime = find_runtime(os.environ.get("UNIONFS_RUNTIME", ""), "", rootless=rootless)
    except RunError as error:
        yield Fact("runtime", "none", str(error))
    else:
        yield Fact("runtime", runtime.name, runtime.path)
    limits = limits_here(rootless=rootless)
    possible = ", ".join(name for name, why in limits.items() if not why)
    yield Fact("limits of containers", possible or "none", next(filter(None, limits.values()), ""))


def _of_the_store(root: str | None, driver: str) -> Iterator[Fact]:
    from unionfs.errors import UnionfsError
    from unionfs.host.fs_magic import fs_magic, fs_name
    from unionfs.layers import default_root, open_store

    where = os.path.abspath(root or default_root())
    if not os.path.isdir(where):
        yield Fact("store", where, "not made yet")
        return
    usage = shutil.disk_usage(where)
    yield Fact("store", where, f"on {fs_name(fs_magic(where))}, {human_size(usage.free)} free")
    try:
        with open_store(where, driver, read_only=True) as store:
            yield Fact("driver", store.driver_name)
    except UnionfsError as error:
        yield Fact("driver", "none", str(error))
