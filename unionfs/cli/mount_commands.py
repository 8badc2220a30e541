"""``unionfs mount``, ``umount`` and ``mounts``."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields

import click

from unionfs.cli.layer_output import print_table, printable
from unionfs.errors import MountError, OptionError
from unionfs.fuse_ops.session import mount_registry
from unionfs.fuse_ops.session.option_text import escape_value, parse_options
from unionfs.host import unmount as unmounting
from unionfs.host.mounts import canonical, holders, is_mounted_anywhere, is_mounted_here, mounts_inside, top_mount
from unionfs.host.processes import has_ended, open_process

# How long a server may take to write everything to the upper directory after its mount is gone.
_SERVER_END_S = 60.0

_ON_OFF = click.Choice(["on", "off"])


@click.command()
@click.option("--lower", "-l", "lowers", multiple=True, metavar="DIR", help="A layer to show; the first is on top.")
@click.option("--data", "datas", multiple=True, metavar="DIR", help="A layer with data only, for metacopy files.")
@click.option("--upper", "-u", metavar="DIR", help="Takes all changes. Without it the mount is read-only.")
@click.option(
    "--work",
    "-w",
    metavar="DIR",
    help="Belongs to the upper, on the same file system. [default: UPPER.work, which is created]",
)
@click.option("--source", metavar="NAME", help="What the mount table shows as the device. [default: unionfs]")
@click.option("--uidmapping", metavar="C:H:N", help="N user ids from C in the layers are shown as those from H.")
@click.option("--gidmapping", metavar="C:H:N", help="The same for groups.")
@click.option("--squash-to-root", is_flag=True, help="Show everything as owned by root.")
@click.option("--squash-to-uid", metavar="UID", help="Show everything as owned by this user.")
@click.option("--squash-to-gid", metavar="GID", help="Show everything as owned by this group.")
@click.option("--static-nlink", is_flag=True, help="Show directories with a link count of 1.")
@click.option("--noacl", is_flag=True, help="No access control lists.")
@click.option("--noxattrs", is_flag=True, help="No extended attributes.")
@click.option("--xattr-permissions", type=click.Choice(["0", "1", "2"]), help="Keep owner and mode in an xattr.")
@click.option("--userxattr", is_flag=True, help="Mark the upper with user.overlay.* in place of trusted.overlay.*.")
@click.option("--volatile", is_flag=True, help="Never wait for the disk. The upper is lost after a crash.")
@click.option("--no-fsync", is_flag=True, help="Take fsync for done at once.")
@click.option("--no-writeback", is_flag=True, help="Write through instead of collecting writes in the kernel.")
@click.option("--timeout", metavar="SECONDS", help="How long the kernel may remember names and attributes.")
@click.option("--redirect-dir", type=click.Choice(["on", "off", "follow", "nofollow"]), help="Rename of directories.")
@click.option("--metacopy", type=_ON_OFF, help="Copy up only the attributes when only they are changed.")
@click.option("--xino", type=click.Choice(["on", "off", "auto"]), help="Inode numbers over several file systems.")
@click.option("--read-only", "-r", is_flag=True, help="Refuse all changes.")
@click.option("--option", "-o", "texts", multiple=True, metavar="OPTION", help="Any option of unionfs-mount.")
@click.option("--force", is_flag=True, help="Also when another mount uses the upper.")
@click.option("--foreground", "-f", is_flag=True, help="Serve in this process until unmounted.")
@click.argument("target")
def mount(
    lowers: Sequence[str],
    datas: Sequence[str],
    upper: str | None,
    work: str | None,
    source: str | None,
    read_only: bool,
    texts: Sequence[str],
    force: bool,
    foreground: bool,
    target: str,
    **named: str | bool | None,
) -> int:
    """Mount layers, and a writable directory on top of them, on TARGET."""
    if not lowers and not texts:
        raise click.UsageError("no layer is given; add --lower DIR", click.get_current_context())
    if work is not None and upper is None:
        raise click.UsageError("--work needs --upper", click.get_current_context())
    if not target:
        raise click.UsageError("TARGET is empty; name a directory", click.get_current_context())
    makes_work = False
    if upper is not None and work is None:
        work = default_work_directory(upper)
        makes_work = True
    # One argument for each layer: the kernel limits the length of an argument, not their number.
    options = [f"lowerdir+={escape_value(path)}" for path in lowers]
    options += [f"datadir+={escape_value(path)}" for path in datas]
    for name, path in (("upperdir", upper), ("workdir", work)):
        if path is not None:
            options.append(f"{name}={escape_value(path)}")
    options += _other_options(named)
    if read_only:
        options.append("ro")
    if not force:
        options.append("exclusive")
    unknown = parse_options([*options, *texts], privileged=True).ignored
    if unknown:
        raise OptionError(f"unknown option {', '.join(unknown)}; leave it out, see unionfs mount --help")
    created = _make_work_directory(work) if makes_work and work is not None else None
    arguments = [argument for option in (*options, *texts) for argument in ("-o", option)]
    command = [sys.executable, "-m", "unionfs.fuse_ops.session.mount_program", *arguments]
    command += ["-f"] if foreground else []
    command += ["--", *([] if source is None else [source]), canonical(target)]
    if foreground:
        os.execv(sys.executable, command)
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, check=False)
    said = os.fsdecode(done.stderr).splitlines()
    if done.returncode == 0:
        for line in said:
            click.echo(line.replace("unionfs-mount: ", "unionfs: ", 1), err=True)
        return 0
    if created is not None:
        _remove_if_empty(created)
    for line in said[:-1]:
        click.echo(line, err=True)
    raise MountError(said[-1].removeprefix("unionfs-mount: ") if said else "the mount program failed silently")


@click.command()
@click.option("--lazy", "-l", is_flag=True, help="Also when in use: out of sight now, gone with its last user.")
@click.argument("targets", nargs=-1, required=True, metavar="TARGET...")
def umount(lazy: bool, targets: Sequence[str]) -> int:
    """Unmount TARGETs, and wait until everything is written."""
    status = 0
    for target in targets:
        try:
            unmount_target(target, lazy=lazy)
        except MountError as error:
            # The others are unmounted all the same.
            click.echo(printable(f"unionfs: {error}"), err=True)
            status = 1
    return status


@click.command()
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def mounts(as_json: bool) -> None:
    """List the mounted unions."""
    found = mount_registry.read_all()
    if as_json:
        click.echo(json.dumps([_as_json(status) for status in found], indent=2))
    elif found:
        _print_table(found)
    else:
        click.echo("No union is mounted.")


def default_work_directory(upper: str) -> str:
    """``UPPER.work``, beside the upper and so in most cases on its file system."""
    return os.path.normpath(upper) + ".work"


def unmount_target(target: str, *, lazy: bool) -> None:
    """Unmount one union and wait for the end of its server; MountError says why not."""
    if not target:
        raise MountError("TARGET is empty; name a mount point, see them with: unionfs mounts")
    path = canonical(target)
    top = top_mount(path)
    if top is None or not top.is_union:
        what = "nothing is mounted there" if top is None else f"{top.fs_type} is mounted there"
        raise MountError(f"{target} is not a union mount, {what}; see them with: unionfs mounts")
    record = mount_registry.find(top)
    server = None if record is None else open_process(record.pid, record.started)
    try:
        if lazy and server is not None:
            try:
                unmounting.sync_mount(path)  # users may keep the server for long; what is written now is kept now
            except OSError:
                pass
        try:
            unmounting.unmount(path, lazy=lazy)
        except OSError as error:
            raise MountError(_why_not(target, path, error)) from None
        if server is not None and not lazy:
            _wait_for_end(server, target, top.minor)
    finally:
        if server is not None:
            os.close(server)


def _why_not(target: str, path: str, error: OSError) -> str:
    if error.errno != errno.EBUSY:
        return f"cannot unmount {target}: {error.strerror}"
    inside = mounts_inside(path)
    if inside:
        return f"{target} is busy: {', '.join(inside[:5])} is mounted inside; unmount it first, or add --lazy"
    users = holders(path)
    if not users:
        return f"{target} is busy, of no process that can be seen from here; end its users, or add --lazy"
    named = ", ".join(f"{user.name} (pid {user.pid}, {user.what})" for user in users[:5])
    more = f" and {len(users) - 5} more" if len(users) > 5 else ""
    return f"{target} is busy: used by {named}{more}; end them, or add --lazy"


def _wait_for_end(server: int, target: str, minor: int) -> None:
    """Wait until the server has written everything."""
    if is_mounted_here(minor):
        return  # bound to other places too, so the server goes on
    elsewhere = is_mounted_anywhere(minor)
    if elsewhere or not has_ended(server, _SERVER_END_S):
        reasons = [] if elsewhere is False else ["another mount namespace has it too"]
        reasons += [] if elsewhere else ["it is still writing"]
        click.echo(f"unionfs: {target} is unmounted here, but its server goes on: {', or '.join(reasons)}", err=True)


def _make_work_directory(path: str) -> str | None:
    """Create the default work directory; returns it when it was not there."""
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        return None
    except OSError as error:
        raise MountError(
            f"cannot create the work directory {path}: {error.strerror}; name another with --work DIR"
        ) from None
    return path


def _remove_if_empty(path: str) -> None:
    try:
        os.rmdir(path)
    except OSError:
        pass


def _other_options(named: dict[str, str | bool | None]) -> list[str]:
    """The options of unionfs-mount for the flags that have the same names."""
    options = []
    for flag, value in named.items():
        if value is None or value is False:
            continue
        if value is True:
            options.append({"no_fsync": "fsync=0", "no_writeback": "writeback=0"}.get(flag, flag))
        else:
            options.append(f"{flag}={escape_value(str(value))}")
    return options


def _as_json(status: mount_registry.MountStatus) -> dict[str, object]:
    if status.record is None:
        record: dict[str, object] = {field.name: None for field in fields(mount_registry.MountRecord)}
    else:
        record = asdict(status.record)
    return {**record, "target": status.target, "state": status.state}


def _print_table(found: Sequence[mount_registry.MountStatus]) -> None:
    rows: list[list[str | list[str]]] = []
    for status in found:
        record = status.record
        if record is None:
            layers, upper, pid = ["?"], "?", "?"
        else:
            names = [*record.lowerdirs, *record.datadirs]
            layers = [*names[:3], *([f"and {len(names) - 3} more"] if len(names) > 3 else [])]
            upper, pid = record.upperdir or "none (read-only)", str(record.pid)
        rows.append([status.target, layers, upper, pid, status.state])
    print_table(("TARGET", "LAYERS", "UPPER", "PID", "STATE"), rows, right=("PID",))
