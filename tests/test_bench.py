"""The benchmark works: every workload runs on every peer and has its row. How long anything took is not looked at."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from bench_parts import documents, driver_calls, figures, image, plot, targets
from bench_parts.catalog import all_workloads, chosen_workloads
from bench_parts.errors import BenchError, SkippedError
from bench_parts.peers import (
    ALL_SPEEDUPS,
    DIRECT,
    FUSE_OVERLAYFS,
    KERNEL,
    PYFUSE3,
    UNIONFS_FUSE,
    MountProgram,
    find_peers,
)
from bench_parts.registering import REGISTER, ROWS
from bench_parts.registrars import OURS
from bench_parts.results import Cell, Results, from_json, geometric_mean
from bench_parts.rootless import PREFIX
from bench_parts.samples import Group, Row, Sample, Unit
from bench_parts.scale import TINY
from bench_parts.splitting import deep_split, entries, image_split, write_layers
from bench_parts.stacks import Stack
from bench_parts.user_namespace import is_rootless, run_rootless
from unionfs.fuse_ops.options import SPEEDUPS
from unionfs.layers import open_store

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
BENCH = [sys.executable, str(SCRIPTS / "bench.py")]
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="the benchmark needs root")


def small_root(path: Path) -> Path:
    """Something that can be split: files, a hard link, a symbolic link, an empty directory, no Python."""
    for directory in ("bin", "etc/sub", "usr/share", "empty"):
        (path / directory).mkdir(parents=True)
    for number in range(40):
        (path / "etc" / f"file-{number}").write_text(f"{number}\n")
        (path / "usr/share" / f"other-{number}").write_bytes(bytes(number * 50))
    (path / "etc/sub/deep").write_text("x")
    os.link(path / "etc/file-1", path / "usr/share/linked")
    (path / "etc/link").symlink_to("file-2")
    return path


@pytest.fixture(scope="module")
def rootfs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_root(tmp_path_factory.mktemp("bench") / "root")


def snapshot(*layers: str) -> dict[str, tuple[int, int, bytes]]:
    """Mode, link count and content of every path, the top layer first."""
    found: dict[str, tuple[int, int, bytes]] = {}
    for layer in layers:
        for path, is_directory in entries(layer):
            full = os.path.join(layer, path)
            info = os.lstat(full)
            if is_directory:
                content, links = b"", 0
            elif os.path.islink(full):
                content, links = os.fsencode(os.readlink(full)), 1
            else:
                content, links = Path(full).read_bytes(), info.st_nlink
            found.setdefault(path, (info.st_mode, links, content))
    return found


@pytest.mark.parametrize("depth", [5, 9, 60])
def test_split_layers_show_the_same_tree(rootfs: Path, tmp_path: Path, depth: int) -> None:
    split = image_split(str(rootfs)) if depth == 5 else deep_split(str(rootfs), depth)
    assert len(split) == depth
    names = Counter(path for layer in split for path in layer)
    assert max(names.values()) == 1
    layers = write_layers(str(rootfs), split, str(tmp_path / "layers"))
    assert snapshot(*layers) == snapshot(str(rootfs))


@needs_root
@pytest.mark.timeout(200)
def test_every_workload_runs_on_every_peer(rootfs: Path, tmp_path: Path) -> None:
    before = Path("/proc/self/mountinfo").read_text()
    found = tmp_path / "results.json"
    argv = [*BENCH, "--scale", "tiny", "--no-requests", "--rootfs", str(rootfs), "--cache", str(tmp_path / "cache")]
    done = subprocess.run([*argv, "--json", str(found)], capture_output=True, text=True, check=False, timeout=180)
    assert done.returncode == 0, done.stderr + done.stdout
    everything = from_json(found.read_text())
    results = everything.only(Group.MOUNTS)
    assert_rootless_workloads_ran(everything.only(Group.ROOTLESS), results)

    peers = [KERNEL, DIRECT, PYFUSE3]
    peers += [FUSE_OVERLAYFS] * bool(shutil.which("fuse-overlayfs"))
    peers += [UNIONFS_FUSE] * os.path.exists("/usr/bin/unionfs-fuse")
    assert sorted(results.peers) == sorted(peers)
    rows = [row for workload in all_workloads(TINY) for row in workload.rows if row.group is Group.MOUNTS]
    assert list(results.rows) == [row.name for row in rows]
    for row in rows:
        assert row.title in done.stdout
        for peer in peers:
            cell = results.cell(row.name, peer)
            if row.name.startswith("python-"):
                assert cell.reason.startswith("skipped: the root file system has no"), cell
            elif row.name.endswith("supervised") and peer != DIRECT:
                assert cell.reason.startswith("skipped: the supervisor is"), cell
            elif peer in (KERNEL, DIRECT, PYFUSE3):
                assert len(cell.samples) == 1, f"{row.name} on {peer}: {cell.reason}"
            else:  # others may fail, and then it is said
                assert cell.samples or cell.reason.startswith("failed: ")
    assert "Targets reached by ours direct" in done.stdout

    images = everything.only(Group.IMAGES)
    assert list(images.peers) == [OURS, "docker load", "podman load", "umoci unpack"]
    assert list(images.rows) == ["register", "register-synced", "register-cpu"]
    for name, row in images.rows.items():
        assert row.title in done.stdout
        for peer in images.peers:
            cell = images.cell(name, peer)
            assert len(cell.samples) == 1, f"{name} with {peer}: {cell.reason}"
            assert cell.samples[0].value > 0

    drivers = everything.only(Group.DRIVERS)
    assert sorted(drivers.peers) == [driver_calls.OVERLAY2, driver_calls.OURS]
    assert list(drivers.rows) == [row.name for row in driver_calls.ROWS]
    for name, row in drivers.rows.items():
        assert row.title in done.stdout
        for peer in drivers.peers:
            cell = drivers.cell(name, peer)
            assert len(cell.samples) == 1, f"{name} with {peer}: {cell.reason}"

    assert Path("/proc/self/mountinfo").read_text().count("unionfs") <= before.count("unionfs")
    assert os.listdir(tmp_path / "cache" / "runs") == []


def assert_rootless_workloads_ran(found: Results, privileged: Results) -> None:
    """Each is one of the privileged ones, and each of the peers that are there had it."""
    assert list(found.peers) == list(privileged.peers)
    assert len(found.rows) >= 10
    for name in found.rows:
        assert name.removeprefix(PREFIX) in privileged.rows
        for peer in (KERNEL, DIRECT, PYFUSE3):
            cell = found.cell(name, peer)
            if name == f"{PREFIX}python-warm":
                assert cell.reason.startswith("skipped: the root file system has no"), cell
            else:
                assert len(cell.samples) == 1, f"{name} on {peer}: {cell.reason}"


@needs_root
def test_what_runs_rootless_has_no_privilege_and_is_root_all_the_same() -> None:
    def look() -> tuple[bool, int, int]:
        with open("/proc/self/status", encoding="ascii") as lines:
            capabilities = next(int(line.split()[1], 16) for line in lines if line.startswith("CapEff:"))
        try:
            os.close(os.open("/proc/1/mem", os.O_RDONLY))  # takes CAP_SYS_PTRACE of the host
        except PermissionError:
            pass
        else:
            raise AssertionError("the host's privileges are there")
        return is_rootless(), os.geteuid(), capabilities.bit_count()

    rootless, uid, capabilities = run_rootless(look)
    assert (rootless, uid) == (True, 0)
    assert capabilities > 30
    assert not is_rootless()


def children() -> str:
    """The processes that were started here and not waited for."""
    return Path(f"/proc/self/task/{os.getpid()}/children").read_text()


@needs_root
def test_what_fails_rootless_is_told_here() -> None:
    def skip() -> None:
        raise SkippedError("not here")

    def missing() -> None:
        os.stat("/nowhere")

    def end() -> None:
        os._exit(3)

    before = children()
    with pytest.raises(SkippedError, match=r"^not here$"):
        run_rootless(skip)
    with pytest.raises(BenchError, match="No such file"):
        run_rootless(missing)
    with pytest.raises(BenchError, match="ended before its time"):
        run_rootless(end)
    assert children() == before


def test_rootless_figures_have_a_table_of_their_own() -> None:
    name = f"{PREFIX}untar"
    results = made_up()
    before = [targets.mean_against_fuse(results, DIRECT), targets.verdicts(results), figures.medians(results)]
    results.rows[name] = Row(name, "untar, rootless", group=Group.ROOTLESS)
    for peer, value in ((KERNEL, 1.0), (FUSE_OVERLAYFS, 4.0), (DIRECT, 5.0)):
        results.cell(name, peer).samples.append(Sample(value))
    assert before == [targets.mean_against_fuse(results, DIRECT), targets.verdicts(results), figures.medians(results)]
    table = figures.medians(results, Group.ROOTLESS)
    assert [row[0] for row in table.rows] == ["untar, rootless"]
    assert table.rows[0][-3:] == ("5.00", "-", "FAIL 1.25 (≤ 1 x fuse-overlayfs)")
    assert table in figures.tables(results)
    assert f"Geometric mean of {DIRECT} / {FUSE_OVERLAYFS}, rootless: 1.25" in figures.summary(results)


def test_what_a_speedup_brings_is_told_in_wall_time_and_cpu_time() -> None:
    results = made_up()
    results.peers["without all"] = "3"
    for row in ("find-cold", "copy-up"):
        ours = results.cell(row, DIRECT)
        results.cells[row, "without all"] = Cell([Sample(2 * s.value, 10, 3 * s.server_cpu_ms) for s in ours.samples])
    assert figures.variants(results).rows[0] == ("title of find-cold", "2.00 / -")  # 1 ms says nothing
    for cell in results.cells.values():
        cell.samples = [Sample(s.value, s.operations, 10 * s.server_cpu_ms) for s in cell.samples]
    table = figures.variants(results)
    assert table.rows[:2] == (("title of find-cold", "2.00 / 3.00"), ("title of copy-up", "2.00 / 3.00"))
    assert table.rows[-1] == ("geometric mean", "2.00 / 3.00")
    assert table in figures.tables(results)
    assert not figures.variants(made_up()).rows


def test_programs_and_speedups_that_are_compared() -> None:
    peers, _ = find_peers(["/bin/true", "old=/bin/false"], "direct", ["placement", ALL_SPEEDUPS])
    found = {peer.name: peer for peer in peers if isinstance(peer, MountProgram)}
    assert found[FUSE_OVERLAYFS].program == "/bin/true"
    assert found["old"].program == "/bin/false"
    assert found["without all"].options == ("transport=direct", "speedups=off")
    kept = found["without placement"].options[1].removeprefix("speedups=").split("+")
    assert set(kept) == SPEEDUPS - {"placement"}
    for wrong in (["/bin/true", "/bin/true"], ["/no/such"], ["=/bin/true"], [f"{DIRECT}=/bin/true"]):
        with pytest.raises(BenchError, match="--peer"):
            find_peers(wrong, "direct")


@needs_root
def test_ours_is_measured_without_a_speedup_and_beside_what_computes(rootfs: Path, tmp_path: Path) -> None:
    found = tmp_path / "results.json"
    argv = [*BENCH, "--scale", "tiny", "--only", "stat-warm", "--transport", "direct", "--rounds", "1", "--no-requests"]
    argv += ["--rootfs", str(rootfs), "--cache", str(tmp_path / "cache"), "--json", str(found)]
    done = subprocess.run([*argv, "--without", "all", "--beside", "1"], capture_output=True, text=True, check=True)
    results = from_json(found.read_text())
    assert len(results.cell("stat-warm", "without all").samples) == 1
    assert results.machine["beside"] == "1 computing"
    assert "In terms of ours direct" in done.stdout


def test_a_group_of_workloads_can_be_chosen() -> None:
    chosen = chosen_workloads(TINY, ["rootless"])
    assert {row.group for workload in chosen.mounts for row in workload.rows} == {Group.ROOTLESS}
    assert not chosen.images
    assert not chosen.drivers
    chosen = chosen_workloads(TINY, ["images", "rootless-untar"])
    assert [row.name for workload in chosen.mounts for row in workload.rows] == ["rootless-untar"]
    assert chosen.images


def test_the_image_that_is_taken_in(rootfs: Path, tmp_path: Path) -> None:
    """skopeo reads both forms, which name the same layers; ours shows what went in."""
    layers = write_layers(str(rootfs), image_split(str(rootfs)), str(tmp_path / "layers"))
    made = image.make(Stack("small", tuple(layers)), str(tmp_path / "image"))
    found = []
    for name in (f"oci:{made.layout}:{image.TAG}", f"docker-archive:{made.archive}"):
        done = subprocess.run(["skopeo", "inspect", "--config", name], capture_output=True, check=True)
        found.append(json.loads(done.stdout)["rootfs"]["diff_ids"])
    assert found[0] == found[1]
    with open_store(tmp_path / "root") as store:
        chain = ""
        for path, diff_id in zip(made.layers, found[0], strict=True):
            with open(path, "rb") as file:
                chain = store.register(file, chain, expected_diff_id=diff_id).chain_id
        with store.create_rw_layer("box", chain).mounted() as merged:
            assert snapshot(merged) == snapshot(str(rootfs))
        assert sum(layer.verify() for layer in store.map().values()) == made.size_bytes
        store.cleanup()


def test_our_ratio_is_to_the_fastest_of_the_others() -> None:
    results = Results(peers={OURS: "1", "docker load": "2", "umoci unpack": "3"}, rows={row.name: row for row in ROWS})
    for peer, value in ((OURS, 30.0), ("docker load", 60.0), ("umoci unpack", 20.0)):
        for row in ROWS:
            results.cell(row.name, peer).samples.append(Sample(value))
    results.cell(REGISTER.name, "umoci unpack").samples[0] = Sample(40.0)
    table = figures.images(results)
    assert [row[-2:] for row in table.rows] == [("0.75", "PASS"), ("1.50", "-"), ("1.50", "-")]
    results.cell(REGISTER.name, OURS).samples[0] = Sample(44.0)
    assert figures.images(results).rows[0][-1] == "FAIL 1.10 (≤ 1)"
    assert from_json(results.to_json()).only(Group.IMAGES).to_json() == results.to_json()
    assert [table.title for table in figures.tables(results)] == ["Medians of taking an image in, in ms"]


@needs_root
def test_requests_are_counted_where_the_kernel_tells_them(rootfs: Path, tmp_path: Path) -> None:
    found = tmp_path / "results.json"
    argv = [*BENCH, "--scale", "tiny", "--only", "stat-cold", "--transport", "direct", "--rounds", "2"]
    argv += ["--rootfs", str(rootfs), "--cache", str(tmp_path / "cache"), "--json", str(found)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, done.stderr
    results = from_json(found.read_text())
    assert list(results.rows) == ["stat-cold"]
    cell = results.cell("stat-cold", DIRECT)
    assert len(cell.samples) == 2
    assert cell.samples[0].operations == TINY.paths
    if os.path.exists("/sys/kernel/tracing/events/fuse/fuse_request_send") or cell.requests:
        assert cell.requests is not None
        assert cell.requests["LOOKUP"] >= 1
    assert results.cell("stat-cold", KERNEL).requests is None


@needs_root
def test_drivers_can_be_measured_alone(rootfs: Path, tmp_path: Path) -> None:
    found = tmp_path / "results.json"
    argv = [*BENCH, "--scale", "tiny", "--only", "driver-get,driver-diff", "--rounds", "2", "--json", str(found)]
    argv += ["--rootfs", str(rootfs), "--cache", str(tmp_path / "cache")]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, done.stderr
    results = from_json(found.read_text())
    assert list(results.rows) == [row.name for row in driver_calls.ROWS]
    assert {len(cell.samples) for cell in results.cells.values()} == {2}, done.stdout


@needs_root
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_stays_when_it_is_interrupted(rootfs: Path, tmp_path: Path, number: signal.Signals) -> None:
    cache = tmp_path / "cache"
    argv = [*BENCH, "--scale", "tiny", "--rounds", "1000", "--only", "stat-warm", "--rootfs", str(rootfs)]
    process = subprocess.Popen(
        [*argv, "--cache", str(cache)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("Round 3"):
            break
    process.send_signal(number)
    said = process.stdout.read()
    process.stdout.close()
    status = process.wait(timeout=60)
    if number != signal.SIGKILL:
        assert status == 130
        assert "interrupted; nothing is left mounted" in said
        assert "random stat, warm" in said, "what was measured until then is shown"
        assert os.listdir(cache / "runs") == []
    deadline = time.monotonic() + 30
    while servers := [pid for pid in os.listdir("/proc") if pid.isdigit() and names(int(pid), str(cache))]:
        assert time.monotonic() < deadline, f"still running: {servers}"
        time.sleep(0.1)
    assert str(cache) not in Path("/proc/self/mountinfo").read_text()


def names(pid: int, text: str) -> bool:
    """Whether the command line of a process has ``text`` in it."""
    try:
        return text in Path(f"/proc/{pid}/cmdline").read_text(errors="replace")
    except OSError:
        return False


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--only", "nonsense"], "there is no workload nonsense"),
        (["--peer", "/nonsense"], "there is no program /nonsense"),
        (["--from", "/nonsense.json"], "cannot read /nonsense.json"),
        (["--json", "/nonsense/file"], "cannot write /nonsense/file"),
        (["--rootfs", "/nonsense"], "/nonsense is not a directory"),
    ],
)
@needs_root
def test_mistakes_are_told_in_one_line(tmp_path: Path, words: list[str], said: str) -> None:
    argv = [*BENCH, "--cache", str(tmp_path), *words]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert done.stderr.startswith("bench: ")
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


def made_up() -> Results:
    """Results with known medians."""
    results = Results(machine={"kernel": "9.9"}, peers={KERNEL: "1", FUSE_OVERLAYFS: "2", DIRECT: "3"})
    figures_of = {
        "find-cold": (10.0, 40.0, 20.0),
        "copy-up": (10.0, 5.0, 12.0),
        "deep-find": (30.0, 90.0, 23.0),
        "mount": (1.0, 20.0, 100.0),
    }
    for name, values in figures_of.items():
        results.rows[name] = Row(name, f"title of {name}")
        for peer, value in zip(results.peers, values, strict=True):
            results.cells[name, peer] = Cell([Sample(v, 10, 1.0) for v in (value, value * 9, value / 9)])
    results.rows["idle"] = Row("idle", "idle", Unit.LOAD)
    results.cells["idle", DIRECT] = Cell([Sample(0.0)])
    results.cells["idle", KERNEL] = Cell(reason="failed: x | y")
    results.cells["find-cold", DIRECT].requests = Counter({"LOOKUP": 20, "READ": 5})
    return results


def test_verdicts_are_those_of_the_issue() -> None:
    verdicts = targets.verdicts(made_up())
    found = {(v.target.row, v.target.against): v for of_row in verdicts.values() for v in of_row}
    against = targets.Against
    assert found["find-cold", against.FUSE].value == 0.5
    assert found["find-cold", against.KERNEL].passed
    assert not found["copy-up", against.KERNEL].passed
    assert ("copy-up", against.FUSE) not in found
    assert ("mount", against.FUSE) not in found
    assert found["mount", against.NOTHING].passed
    assert found["deep-find", against.OUR_ROW].value == pytest.approx(1.15)
    assert found["deep-find", against.KERNEL].passed
    assert found["idle", against.NOTHING].passed
    mean = targets.mean_against_fuse(made_up(), DIRECT)
    assert mean == pytest.approx((0.5 * 23 / 90) ** 0.5)
    assert geometric_mean([]) is None


def test_every_target_is_about_a_row() -> None:
    rows = {row.name for workload in all_workloads(TINY) for row in workload.rows}
    for target in targets.TARGETS:
        assert target.row in rows
        assert not target.other_row or target.other_row in rows


def test_results_survive_being_written_and_read() -> None:
    results = made_up()
    again = from_json(results.to_json())
    assert figures.medians(again) == figures.medians(results)
    assert figures.server_costs(again) == figures.server_costs(results)
    assert figures.summary(again) == figures.summary(results)
    assert json.loads(results.to_json())["rows"][0]["peers"][KERNEL]["median"] == 10.0
    with pytest.raises(BenchError, match="not a file that --json wrote"):
        from_json("[]")


def test_documents_get_their_section(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the plot needs scripts/setup --bench")
    document = tmp_path / "performance.md"
    document.write_text(f"before\n{documents.BEGIN}\nformer figures\n{documents.END}\nafter\n")
    for _ in range(2):
        documents.write(made_up(), str(document))
        text = document.read_text()
        assert text.startswith("before\n")
        assert text.endswith("\nafter\n")
        assert "former figures" not in text
        assert text.count("| title of find-cold |") == 2
        assert "failed: x | y" in text
    assert (tmp_path / documents.PLOT).read_bytes().startswith(b"\x89PNG")
    document.write_text("no marks")
    with pytest.raises(BenchError, match="lacks the line"):
        documents.write(made_up(), str(document))


def test_a_plot_needs_something_to_compare(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="nothing to compare with"):
        plot.draw(Results(peers={DIRECT: "1"}), str(tmp_path / "plot.png"))


def test_a_plot_can_be_read() -> None:
    """A legend of those who have bars, a colour for each, and where the figures are from."""
    pytest.importorskip("matplotlib", reason="the plot needs scripts/setup --bench")
    results = made_up()
    results.machine = {"date": "2026-01-02", "processor": "2 x Fast", "kernel": "9.9", "rounds": "3"}
    others = [f"other {number}" for number in range(4)]
    results.peers |= dict.fromkeys(["absent", *others], "1")
    for number, peer in enumerate(others):
        results.cells["find-cold", peer] = Cell([Sample(10.0 + number)])
    results.cells["find-cold", "absent"] = Cell(reason="skipped")
    figure = plot.figure_of(results)
    (legend,), (axes,) = figure.legends, figure.axes
    assert [text.get_text() for text in legend.get_texts()] == [KERNEL, DIRECT, *others]
    drawn = {bar.get_facecolor() for bar in axes.patches}
    assert len(drawn) == len({*legend_colours(legend)}) == 6
    assert figure.get_suptitle() == f"Union file systems: time relative to {FUSE_OVERLAYFS}"
    assert axes.get_title() == "2026-01-02, 2 x Fast, Linux 9.9"
    assert next(label.get_text() for label in axes.get_yticklabels()) == "title of find-cold"
    assert "title of idle" not in {label.get_text() for label in axes.get_yticklabels()}
    results.peers |= {f"more {number}": "1" for number in range(9)}
    for number in range(9):
        results.cells["find-cold", f"more {number}"] = Cell([Sample(1.0)])
    with pytest.raises(BenchError, match="too many for one plot"):
        plot.figure_of(results)


def legend_colours(legend: Any) -> list[Any]:
    """The colour of each entry."""
    return [handle.get_facecolor() for handle in legend.get_patches()]


def test_our_document_has_the_marks() -> None:
    text = (SCRIPTS.parent / "docs/performance.md").read_text()
    assert text.count(documents.BEGIN) == 1
    assert text.count(documents.END) == 1
