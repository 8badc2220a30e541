"""The quickstart: mounts a root file system under a fresh layer, works in it, and shows what that changed.

Run it as ``scripts/quickstart``, which sets up what it needs first.
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
from types import FrameType
from typing import NoReturn

import click

from quickstart_steps import deb as debs
from quickstart_steps import report, rootfs, userns
from quickstart_steps.errors import CommandFailedError, QuickstartError
from quickstart_steps.job import Job
from quickstart_steps.rootfs import Rootfs
from quickstart_steps.sandbox import Sandbox
from quickstart_steps.storage import Storage, default_directory
from quickstart_steps.union import Union, mounted
from unionfs.errors import UnionfsError


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option(
    "--rootfs",
    "rootfs_path",
    metavar="DIR|TAR",
    type=click.Path(),
    help="Work in this root file system instead of a Debian built for the occasion. It is not changed.",
)
@click.option("--suite", default="bookworm", show_default=True, help="The Debian release to build.")
@click.option("--refresh", is_flag=True, help="Build the Debian root file system again, although one is cached.")
@click.option(
    "--deb", metavar="FILE", type=click.Path(), help="Install this package instead of a small one of our own."
)
@click.option("--keep", is_flag=True, help="Keep the layers, and say how to mount them again.")
@click.option("--cache", metavar="DIR", type=click.Path(), help="Where to keep files. Default: the user's cache.")
@click.option("--debug", is_flag=True, help="Show the whole output of what fails, and where in the code it was.")
def main(
    *, rootfs_path: str | None, suite: str, refresh: bool, deb: str | None, keep: bool, cache: str | None, debug: bool
) -> None:
    """Mount a root file system under a fresh writable layer, change it, and show what changed.

    Programs are run in it with their own mounts and process ids: a package is installed and another one deleted, files
    are edited, a directory is moved. Nothing is left mounted, and nothing outside of the cache is written.
    """
    # Debian keeps chroot and others out of an ordinary user's PATH.
    os.environ["PATH"] = os.environ.get("PATH", os.defpath) + ":/usr/local/sbin:/usr/sbin:/sbin"
    try:
        check_fuse()
        userns.become_root([sys.executable, *sys.argv])
        run(rootfs_path, suite, deb, Storage(cache or default_directory()), refresh=refresh, keep=keep)
    except UnionfsError as error:
        if debug:
            if isinstance(error, CommandFailedError):
                print(error.output, file=sys.stderr)
            raise
        sys.exit(f"quickstart: {error}")
    except Exception as error:
        if debug:
            raise
        sys.exit(f"quickstart: {type(error).__name__}: {error}; this was not foreseen, see it whole with --debug")
    except KeyboardInterrupt:
        print("quickstart: interrupted; nothing is left mounted", file=sys.stderr)
        sys.exit(130)


def check_fuse() -> None:
    """Say now what would make the mount fail after minutes of building."""
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        raise QuickstartError(f"cannot open /dev/fuse: {error.strerror}; scripts/setup says what to do") from error


def run(
    rootfs_path: str | None, suite: str, package: str | None, storage: Storage, *, refresh: bool, keep: bool
) -> None:
    """The whole job."""
    if package is not None:
        debs.package_name(package)  # a wrong one is told before anything is built
    with storage.run_directory(keep=keep) as directory:
        with Sandbox() as sandbox:
            lower = find_rootfs(rootfs_path, suite, directory, storage, sandbox, refresh=refresh)
            print(f"Root file system: {lower.title}")
            union = Union.create(lower.path, directory)
            with mounted(union, sandbox) as root:
                Job(sandbox, root).run(package, directory)
        report.print_changes(union.upper, union.lower)
        report.print_sizes(union.upper, union.lower)
        if not keep:
            print("\nThe upper layer is removed now; --keep keeps it.")
        else:
            print(f"\nKept in {directory}; delete it when it is no longer needed. To mount it again:")
            print(shlex.join(union.mount_command))


def find_rootfs(
    path: str | None, suite: str, directory: str, storage: Storage, sandbox: Sandbox, *, refresh: bool
) -> Rootfs:
    """The root file system that was asked for."""
    if path is None:
        return rootfs.debian(suite, storage, sandbox, refresh=refresh)
    if os.path.isdir(path):
        return rootfs.from_directory(path)
    return rootfs.from_archive(path, os.path.join(directory, "lower"), sandbox)


def _terminated(number: int, _frame: FrameType | None) -> NoReturn:
    # As ^C: through all the clean-up on the way out.
    raise KeyboardInterrupt(signal.Signals(number).name)


if __name__ == "__main__":
    for _signal in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(_signal, _terminated)
    main(prog_name="scripts/quickstart")
