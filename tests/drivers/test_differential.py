"""Random layer operations on all drivers at once: the same trees, the same changes, the same archives.

``HYPOTHESIS_PROFILE=ci`` or ``long`` runs more sequences. A failing one is named by its seed and printed step by step.
"""

from __future__ import annotations

import io
import os
import random
import shutil
import stat
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from tests.drivers.rig import Rig, make_rig
from tests.support.snapshot import Snapshot, differences, snapshot

pytestmark = [pytest.mark.differential]

SEEDS = {"ci": 30, "long": 1000}.get(os.environ.get("HYPOTHESIS_PROFILE", "dev"), 3)
STEPS = 28
START_S = 1_200_000_000
KINDS = (
    *("write", "write", "write", "rewrite", "append", "mkdir", "symlink", "fifo", "device", "link", "chmod", "chown"),
    *("xattr", "rename", "rename", "unlink", "rmtree", "remake", "replace_dir", "replace_file"),
)


@dataclass(slots=True)
class World:
    """The layers as they should be, and the drivers that have them."""

    rigs: list[Rig]
    random: random.Random
    renames_directories: bool
    parents: dict[str, str] = field(default_factory=dict)
    committed: set[str] = field(default_factory=set)
    log: list[str] = field(default_factory=list)
    clock: int = START_S
    made: int = 0

    def note(self, text: str) -> None:
        self.log.append(text)

    def tick_ns(self) -> int:
        """A time of its own for every operation: what is done at the same time on all drivers must look so."""
        self.clock += 2
        return self.clock * 10**9 + self.random.choice([0, 1, 500_000_000, 999_999_999])

    def childless(self) -> list[str]:
        return [layer for layer in self.parents if layer not in self.parents.values()]

    def add(self, layer: str, parent: str) -> None:
        self.parents[layer] = parent
        self.committed.add(parent)

    def writable(self) -> list[str]:
        """A layer stays read-only after its last child is gone; base layers are never mounted."""
        return [layer for layer in self.childless() if layer not in self.committed]

    def new_id(self) -> str:
        self.made += 1
        return f"layer{self.made}"


def paths_in(root: str) -> tuple[list[str], list[str]]:
    """The directories (the root is ``""``) and the other names below ``root``, in a fixed order."""
    directories: list[str] = [""]
    others: list[str] = []
    for at, dirs, files in os.walk(root):
        dirs.sort()
        rel = os.path.relpath(at, root)
        prefix = "" if rel == "." else rel + "/"
        for name in dirs:
            (others if os.path.islink(f"{at}/{name}") else directories).append(prefix + name)
        others += [prefix + name for name in sorted(files)]
    return sorted(directories), sorted(others)


@dataclass(frozen=True, slots=True)
class Edit:
    """One change to a tree, done in the same way on every driver."""

    kind: str
    path: str
    other: str
    number: int
    mtime_ns: int

    def do(self, root: str) -> None:
        """Make the change and give everything that it touched a fixed time."""
        full, other = os.path.join(root, self.path), os.path.join(root, self.other)
        data = random.Random(self.number).randbytes(self.number % 9000)
        match self.kind:
            case "write":
                Path(full).write_bytes(data)
            case "append":
                with open(full, "ab") as file:
                    file.write(data[:50])
            case "mkdir":
                os.mkdir(full, 0o755)
            case "symlink":
                os.symlink(f"to/{self.number}", full)
            case "fifo":
                os.mkfifo(full)
            case "device":
                os.mknod(full, stat.S_IFCHR | 0o600, os.makedev(1, 3))
            case "unlink":
                os.unlink(full)
            case "rmtree":
                shutil.rmtree(full)
            case "remake":
                shutil.rmtree(full)
                os.mkdir(full, 0o755)
            case "chmod":
                os.chmod(full, self.number % 0o1000 | 0o400)
            case "chown":
                os.lchown(full, self.number % 70000, self.number % 50)
            case "xattr":
                os.setxattr(full, "user.note", data[:20])
            case "rename":
                os.rename(full, other)
            case "link":
                os.link(full, other)
            case "replace_dir":
                shutil.rmtree(full)
                Path(full).write_bytes(data)
            case "replace_file":
                os.unlink(full)
                os.mkdir(full, 0o711)
        for touched in (full, other):
            for path in (touched, os.path.dirname(touched)):
                if os.path.lexists(path):
                    os.utime(path, ns=(self.mtime_ns, self.mtime_ns), follow_symlinks=False)


def edits(world: World, root: str) -> list[Edit]:
    """Up to eight edits for the tree at ``root``; each is done there at once, since the next one depends on it."""
    done = []
    for _ in range(world.random.randint(1, 8)):
        edit = choose_edit(world, root)
        if edit is not None:
            edit.do(root)
            done.append(edit)
            world.note(f"  {edit}")
    return done


def choose_edit(world: World, root: str) -> Edit | None:
    rnd = world.random
    directories, others = paths_in(root)
    # A file with several names is copied up name by name without an index; a copy keeps them together.
    free = [path for path in others if os.lstat(os.path.join(root, path)).st_nlink == 1]
    files = [path for path in free if stat.S_ISREG(os.lstat(os.path.join(root, path)).st_mode)]
    parent = rnd.choice(directories)
    fresh = os.path.join(
        parent, f"{rnd.choice('abc')}{rnd.choice(['', '-', '.x', 'ü', chr(0xDCFF)])}{rnd.randint(0, 99)}"
    )
    kind = rnd.choice(KINDS)
    inner = [path for path in directories if path]
    # Removing a tree must not take one name of several with it.
    whole = [path for path in inner if not any(p.startswith(path + "/") for p in set(others) - set(free))]
    path, other = fresh, ""
    match kind:
        case "rewrite":
            kind, path = "write", rnd.choice(files) if files else fresh
        case "append":
            path = rnd.choice(files) if files else ""
        case "unlink":
            path = rnd.choice(others) if others else ""
        case "replace_file":
            path = rnd.choice(free) if free else ""
        case "rmtree" | "remake" | "replace_dir":
            path = rnd.choice(whole) if whole else ""
        case "chmod":
            path = rnd.choice(inner + files) if inner + files else ""
        case "chown" | "xattr":
            candidates = inner + (files if kind == "xattr" else free)
            path = rnd.choice(candidates) if candidates else ""
        case "rename":
            candidates = free + (whole if world.renames_directories else [])
            path, other = (rnd.choice(candidates) if candidates else ""), fresh
            if other.startswith(path + "/"):
                return None
        case "link":
            path, other = (rnd.choice(files) if files else ""), fresh
    if not path or (path == fresh and os.path.lexists(os.path.join(root, fresh))):
        return None
    return Edit(kind, path, other, rnd.randint(0, 1 << 30), world.tick_ns())


def step(world: World) -> None:
    rnd = world.random
    choice = rnd.choice(["create", "create", "edit", "edit", "edit", "edit", "copy", "remove", "get", "put", "restart"])
    if not world.parents or choice == "create":
        layer, parent = world.new_id(), rnd.choice(["", *world.parents, *world.parents])
        world.note(f"create {layer} on {parent!r}")
        for rig in world.rigs:
            rig.driver.create_read_write(layer, parent)
        world.add(layer, parent)
    elif choice == "edit":
        if world.writable():
            edit_layer(world, rnd.choice(world.writable()))
    elif choice == "copy":
        copy_layer(world, rnd.choice(list(world.parents)))
    elif choice == "remove":
        layer = rnd.choice(world.childless())
        world.note(f"remove {layer}")
        for rig in world.rigs:
            rig.driver.remove(layer)
        del world.parents[layer]
    elif choice == "get":
        layer = rnd.choice(list(world.parents))
        world.note(f"get {layer}")
        for rig in world.rigs:
            rig.driver.get(layer)
    elif choice == "put":
        layer = rnd.choice(list(world.parents))
        world.note(f"put {layer}")
        for rig in world.rigs:
            rig.driver.put(layer)
    else:
        world.note("restart")
        for rig in world.rigs:
            rig.restart()


def edit_layer(world: World, layer: str) -> None:
    world.note(f"edit {layer}")
    first, *others = world.rigs
    with first.got(layer) as root:
        done = edits(world, root)
    for rig in others:
        with rig.got(layer) as root:
            for edit in done:
                edit.do(root)


def copy_layer(world: World, layer: str) -> None:
    """Its difference to its parent, applied to a new child of the parent."""
    parent, copy = world.parents[layer], world.new_id()
    world.note(f"copy {layer} to {copy}")
    archives = []
    for rig in world.rigs:
        with rig.driver.diff(layer, parent) as stream:
            archives.append(stream.read())
        rig.driver.create(copy, parent)
        rig.driver.apply_diff(copy, parent, io.BytesIO(archives[-1]))
    world.add(copy, parent)
    assert all(archive == archives[0] for archive in archives), f"archives of {layer} differ"


def tree_of(rig: Rig, layer: str) -> Snapshot:
    with rig.got(layer) as root:
        found = snapshot(root, check_ino=False)
    # The root's time is that of its directory's making; link counts are those of the layer that holds a file.
    found["."] = replace(found["."], mtime_ns=0)
    return {path: replace(entry, nlink=0, links=()) for path, entry in found.items()}


def compare(world: World) -> None:
    first, *others = world.rigs
    for layer, parent in world.parents.items():
        pairs = [(layer, parent), (layer, "")]
        if parent and world.parents[parent]:
            pairs.append((layer, world.parents[parent]))
        expected_tree = tree_of(first, layer)
        expected = {pair: [str(change) for change in first.driver.changes(*pair)] for pair in pairs}
        archives = {pair: first.driver.diff(*pair).read() for pair in pairs}
        sizes = {pair: first.driver.diff_size(*pair) for pair in pairs}
        for rig in others:
            names = (first.kind, rig.kind)
            lines = differences(expected_tree, tree_of(rig, layer), names)
            assert not lines, f"{layer}:\n" + "\n".join(lines[:20])
            for pair in pairs:
                changes = [str(change) for change in rig.driver.changes(*pair)]
                assert changes == expected[pair], f"changes of {pair}: {names}"
                assert rig.driver.diff(*pair).read() == archives[pair], f"archive of {pair}: {names}"
                assert rig.driver.diff_size(*pair) == sizes[pair], f"size of {pair}: {names}"


def run(kinds: tuple[str, ...], seed: int, base: str, *, renames_directories: bool) -> None:
    with ExitStack() as stack:
        rigs = [stack.enter_context(make_rig(kind, base)) for kind in kinds]
        world = World(rigs, random.Random(seed), renames_directories)
        try:
            for _ in range(STEPS):
                step(world)
            compare(world)
        except BaseException:
            print("\n".join(world.log))
            raise
        for rig in rigs:
            rig.driver.cleanup()
            assert rig.mounts() == []


@pytest.mark.parametrize("seed", range(SEEDS))
def test_all_drivers_agree(seed: int, tmp_path: Path) -> None:
    run(("unionfs", "overlay2", "vfs", "plugin"), seed, str(tmp_path), renames_directories=False)


@pytest.mark.parametrize("seed", range(1000, 1000 + SEEDS))
def test_drivers_that_rename_directories_agree(seed: int, tmp_path: Path) -> None:
    """The kernel's overlayfs refuses to rename directories of lower layers."""
    run(("unionfs", "vfs"), seed, str(tmp_path), renames_directories=True)


def test_the_comparison_sees_a_difference(tmp_path: Path) -> None:
    with make_rig("overlay2", str(tmp_path)) as one, make_rig("vfs", str(tmp_path)) as two:
        world = World([one, two], random.Random(0), False, parents={"x": ""})
        for rig in world.rigs:
            rig.driver.create("x")
            with rig.got("x") as root:
                Path(root, "f").write_bytes(b"1")
                os.utime(root + "/f", ns=(0, 0 if rig is one else 1))
        with pytest.raises(AssertionError, match="f: mtime_ns: overlay2 0, vfs 1"):
            compare(world)
