"""The benchmark: the same layers mounted by the kernel, by other union file systems and by ours, side by side.

Run it as ``scripts/bench``, which sets up what it needs first. docs/performance.md says how to read what it prints.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Sequence

import click

from bench_parts import documents, image, plot, stacks, terminal
from bench_parts.catalog import Chosen, all_rows, chosen_workloads
from bench_parts.driver_calls import DriverCalls, driver_peers
from bench_parts.errors import BenchError
from bench_parts.isolation import run_isolated
from bench_parts.machine import describe
from bench_parts.peers import ALL_SPEEDUPS, Peer, find_peers
from bench_parts.processes import computing
from bench_parts.registering import Registering
from bench_parts.registrars import Registrar, find_registrars
from bench_parts.requests import request_counter
from bench_parts.results import Results, from_json
from bench_parts.rig import Rig
from bench_parts.runner import Runner
from bench_parts.samples import Group
from bench_parts.scale import FULL, QUICK, SCALES, Scale
from quickstart_steps.progress import step
from quickstart_steps.storage import Storage, default_directory
from unionfs.errors import UnionfsError
from unionfs.fuse_ops.options import SPEEDUPS

_DOCUMENT = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "docs", "performance.md")


_GROUPS = {
    Group.MOUNTS: "",
    Group.ROOTLESS: "",
    Group.IMAGES: ", taking an image in",
    Group.DRIVERS: ", by a graph driver",
}


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--quick", is_flag=True, help="Smaller workloads and two rounds: to see whether it works, not how fast.")
@click.option("--only", metavar="WORKLOAD,...", default="", help="Only these, or groups of them; --list names them.")
@click.option(
    "--peer",
    "programs",
    metavar="[NAME=]PATH",
    multiple=True,
    help="A mount program to measure in the place of Debian's fuse-overlayfs; with NAME, as one more.",
)
@click.option(
    "--without",
    multiple=True,
    type=click.Choice([*sorted(SPEEDUPS), ALL_SPEEDUPS]),
    help="Measure ours once more without this speed-up.",
)
@click.option("--beside", metavar="N", type=click.IntRange(0), default=0, help="Beside N processes that compute.")
@click.option("--rounds", metavar="N", type=click.IntRange(1), help="How often each is measured. Default: 5.")
@click.option(
    "--transport", type=click.Choice(["direct", "pyfuse3", "both"]), default="both", show_default=True, help="Of ours."
)
@click.option("--json", "json_path", metavar="FILE", type=click.Path(), help="Write all figures to FILE.")
@click.option("--plot", "plot_path", metavar="FILE", type=click.Path(), help="Draw the ratios into FILE, a PNG.")
@click.option("--write-docs", is_flag=True, help="Write tables and plot into docs/performance.md.")
@click.option("--from", "from_path", metavar="FILE", type=click.Path(), help="Measure nothing: show FILE of --json.")
@click.option("--rootfs", metavar="DIR", type=click.Path(), help="Split this root file system, not a Debian.")
@click.option("--scale", type=click.Choice(list(SCALES)), help="How much each workload does. Default: full.")
@click.option("--cache", metavar="DIR", type=click.Path(), help="Where layers are kept. Default: /var/cache/unionfs.")
@click.option("--no-requests", is_flag=True, help="Leave out the round that counts requests.")
@click.option("--list", "list_only", is_flag=True, help="List the workloads.")
@click.option("--debug", is_flag=True, help="Show where in the code an error was.")
def main(
    *,
    quick: bool,
    only: str,
    programs: tuple[str, ...],
    without: tuple[str, ...],
    beside: int,
    rounds: int | None,
    transport: str,
    json_path: str | None,
    plot_path: str | None,
    write_docs: bool,
    from_path: str | None,
    rootfs: str | None,
    scale: str | None,
    cache: str | None,
    no_requests: bool,
    list_only: bool,
    debug: bool,
) -> None:
    """Measure unionfs beside the kernel's overlayfs, fuse-overlayfs and unionfs-fuse, and compare with our targets.

    All of them mount the same layers, in turns, on empty caches where that matters. It needs root and, for figures to
    be trusted, a machine that does nothing else. Nothing is left mounted; only layers are kept, in the cache.
    """
    try:
        size = SCALES[scale] if scale else QUICK if quick else FULL
        if list_only:
            list_workloads(size)
            return
        for path in filter(None, (json_path, plot_path)):
            check_writable(path)
        if from_path is None:
            status, results = measure(
                size,
                [name for name in only.split(",") if name],
                programs,
                without,
                rounds,
                transport,
                rootfs,
                cache,
                beside=beside,
                count_requests=not no_requests,
                debug=debug,
            )
        else:
            status, results = 0, read(from_path)
        show(results, json_path, plot_path, write_docs=write_docs and status == 0)
        sys.exit(status)
    except UnionfsError as error:
        if debug:
            raise
        sys.exit(f"bench: {error}")
    except KeyboardInterrupt:
        print("bench: interrupted; nothing is left mounted", file=sys.stderr)
        sys.exit(130)


def list_workloads(scale: Scale) -> None:
    """Print the names that ``--only`` takes."""
    for row in all_rows(scale):
        print(f"{row.name:<16} {row.title}" + _GROUPS[row.group])


def check_writable(path: str) -> None:
    """Find out now, and not after an hour, that a file cannot be written."""
    directory = os.path.dirname(os.path.abspath(path))
    if os.path.isdir(path) or not os.access(directory, os.W_OK):
        raise BenchError(f"cannot write {path}; name a file in a directory that is there")


def measure(
    scale: Scale,
    only: list[str],
    programs: Sequence[str],
    without: Sequence[str],
    rounds: int | None,
    transport: str,
    rootfs: str | None,
    cache: str | None,
    *,
    beside: int,
    count_requests: bool,
    debug: bool,
) -> tuple[int, Results]:
    """Measure in a process of its own; returns its exit status and what it found, all of it or until then."""
    if os.geteuid() != 0:
        raise BenchError("mounting the kernel's overlayfs and emptying caches need root; run: sudo scripts/bench")
    if rootfs is not None and not os.path.isdir(rootfs):
        raise BenchError(f"{rootfs} is not a directory; give an unpacked root file system after --rootfs")
    os.environ["PATH"] = os.environ.get("PATH", os.defpath) + ":/usr/local/sbin:/usr/sbin:/sbin"
    chosen = chosen_workloads(scale, only)
    peers, missing = find_peers(programs, transport, without) if chosen.mounts else ([], [])
    registrars, more_missing = find_registrars() if chosen.images else ([], [])
    for line in missing + more_missing:
        print(f"bench: {line}", file=sys.stderr)
    storage = Storage(cache or default_directory())
    with storage.run_directory(keep=False) as directory:
        found = os.path.join(directory, "results.json")
        count = rounds or scale.rounds
        status = run_isolated(
            lambda: inner(
                storage,
                directory,
                found,
                scale,
                chosen,
                peers,
                registrars,
                count,
                rootfs,
                beside=beside,
                count_requests=count_requests,
            ),
            debug=debug,
        )
        if status == 130:
            print("bench: interrupted; nothing is left mounted", file=sys.stderr)
        if not os.path.exists(found):
            sys.exit(status or 1)
        return status, read(found)


def inner(
    storage: Storage,
    directory: str,
    found: str,
    scale: Scale,
    chosen: Chosen,
    peers: list[Peer],
    registrars: list[Registrar],
    rounds: int,
    rootfs: str | None,
    *,
    beside: int,
    count_requests: bool,
) -> int:
    """What runs in the namespaces: writes what it found to the file ``found``."""
    results = Results()
    try:
        layers = stacks.prepare(storage, scale, rootfs, directory)
        results.machine = describe(scale.name, rounds, layers.title, beside)
        mounts = os.path.join(directory, "m")
        os.mkdir(mounts)
        rig = Rig(mounts, layers, scale)
        runner = Runner(rig, chosen.mounts, peers, results)
        with request_counter() as counter, computing(beside):
            try:
                if chosen.mounts:
                    runner.run(rounds)
                if chosen.images:
                    Runner(rig, [Registering(packed(layers, directory))], registrars, results).run(rounds)
                if chosen.drivers:
                    calls = DriverCalls(os.path.join(directory, "drivers"))
                    Runner(rig, [calls], driver_peers(), results).run(rounds)
                if chosen.mounts and counter is not None and count_requests:
                    runner.count_requests(counter)
            finally:
                with open(found, "w", encoding="utf-8") as file:
                    file.write(results.to_json())
    except UnionfsError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    return 0


def packed(layers: stacks.Stacks, directory: str) -> image.Image:
    """The image that is taken in."""
    with step("Packing the layers as an image"):
        try:
            return image.make(layers.debian, os.path.join(directory, "image"))
        except (OSError, subprocess.CalledProcessError) as error:
            raise BenchError(f"cannot pack the layers as an image ({error}); make room in {directory}") from error


def read(path: str) -> Results:
    """The results in a file."""
    try:
        with open(path, encoding="utf-8") as file:
            return from_json(file.read())
    except OSError as error:
        raise BenchError(f"cannot read {path}: {error.strerror}; give a file that --json wrote") from error


def show(results: Results, json_path: str | None, plot_path: str | None, *, write_docs: bool) -> None:
    """Print the tables, and write the files that were asked for."""
    terminal.show(results)
    if json_path is not None:
        with open(json_path, "w", encoding="utf-8") as file:
            file.write(results.to_json() + "\n")
    if plot_path is not None:
        plot.draw(results, plot_path)
    if write_docs:
        documents.write(results, _DOCUMENT)
        print(f"written: {_DOCUMENT}")


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        main()
