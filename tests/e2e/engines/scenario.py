"""What every engine has to do on our storage: one story, told to each engine, with what it showed written down.

`play` drives an engine through it and checks what is true on any storage. It returns a `Record` of what the engine
showed; the record of an engine on our storage has to be that on its own (`differences`).

What differs by the engine's own doing is taken out here, and nowhere else:

* times of what was made during the test are ``now``; sizes of directories and inode numbers are left out;
* what engines put into every container (``/etc/hosts``, ``/dev``, ...) is left out, and the times of the directories
  that hold it.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import tarfile
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal, Protocol

from tests.e2e.engines.awkward_image import CENSUS, EXPECTED, EXPECTED_LINKS, LONG_NAME, TAG, AwkwardImage
from tests.e2e.engines.private import Cell

Part = Literal["diff", "commit", "build", "save", "export", "copy", "restart"]
EVERYTHING: frozenset[Part] = frozenset({"diff", "commit", "build", "save", "export", "copy", "restart"})
Tree = dict[str, dict[str, str]]
"""Path, without a slash in front, to what is known of it."""
Fault = tuple[str, str]
"""Where a storage is known to be wrong: patterns, as of a shell, for a step and for a path (or line) in it."""

AT_ONCE = 20
# What engines put into a container, beneath what the image has; below /dev etc. too.
_OF_THE_ENGINE = ("dev", "proc", "sys", "etc/hosts", "etc/hostname", "etc/resolv.conf", "etc/mtab", "run", ".dockerenv")
_APPLETS = "sh cat chmod chown echo find ln md5sum mkdir mkfifo mv rm sed stat touch"
_HOLD_THE_ENGINES = (".", "etc", "run", "dev")

# Done in a running container. Each line is something that a union file system got wrong once.
CHANGE = f"""
set -e
cd /
echo more >>etc/passwd
rm -r d2; mkdir d2; echo 1 >d2/again
mv d4 d5
mv d5/old d5/renamed
rm -r turns/file; echo file >turns/file
rm turns/again; mkdir turns/again
echo changed >>links/a
rm links/q
chmod 600 modes/all
chown 1000:1000 modes/owned
touch -d @1500000000 data/block
: >data/odd
ln -s /nowhere kinds/new-link
mkfifo kinds/new-fifo
rm kinds/absolute
rm names/*dash names/caf*
echo 1 >names/{LONG_NAME[:200]}
echo 1 >names/{"w" * 255}
mkdir -p made/deep/er; echo deep >made/deep/er/file; chmod 2750 made
ln made/deep/er/file made/hard
mv whiteout/dir whiteout/moved
dd if=/dev/zero of=data/sparse bs=1 count=1 seek=2097151 conv=notrunc 2>/dev/null
"""
# "docker diff" of it. Paths are whole names, the parents of a change are changed too.
_DIFF = """
C etc|C etc/passwd|C d2|A d2/again|D d2/new|D d2/later|D d2/sub|D d4|A d5|A d5/added|A d5/renamed|C turns
C turns/file|C turns/again|C links|C links/a|D links/q|C modes|C modes/all|C modes/owned|C data|C data/block
C data/odd|C data/sparse|C kinds|A kinds/new-link|A kinds/new-fifo|D kinds/absolute|C names|D names/-dash|A made
A made/deep|A made/deep/er|A made/deep/er/file|A made/hard|C whiteout|D whiteout/dir|A whiteout/moved
A whiteout/moved/new
"""
EXPECTED_DIFF = frozenset(_DIFF.strip().replace("\n", "|").split("|"))

FROM_SCRATCH = """
FROM scratch
COPY rootfs/ /
RUN mkdir -p /data/sub && echo one >/data/one && echo two >/data/sub/two && chmod 4750 /data/one && mkfifo /data/p
COPY --chown=1000:1001 files /copied/
RUN mv /data/sub /data/moved && chown 5:6 /data/one
RUN ln /copied/a /copied/hard && ln /copied/a /linked && ln -s nowhere /copied/dangling
RUN rm /copied/b && rm -r /data/moved && mkdir /data/moved && echo new >/data/moved/new
RUN mkdir -p /deep/a/b/c && echo x >/deep/a/b/c/d && mv /deep/a /deep/z
RUN mv /deep /shallow
RUN rm /linked && echo changed >>/copied/c && touch -d @1500000000 /copied/c
RUN rm /data/p && mkdir /data/p && touch /data/p/now-a-directory && rm -r /shallow/z/b/c && echo y >/shallow/z/b/c
"""
FROM_IMAGE = f"""
FROM {TAG}
RUN mv /d4 /d5 && mv /d5/old /d5/renamed
COPY --chown=1000:1001 files /copied/
RUN rm -r /d2 && mkdir /d2 && echo again >/d2/again
RUN ln /copied/a /copied/hard && chmod 4711 /copied/hard
RUN rm /links/a && rm -r /turns && echo file >/turns
RUN mv /d5 /d6 && rm /d6/renamed
RUN chown -R 1000:1000 /whiteout && chmod 700 /whiteout
RUN rm /turns && mkdir -p /turns/a/b && echo c >/turns/a/b/c
COPY files/a /turns/a/b/c
RUN mv /turns/a /moved && rm -r /d3 && touch /names/{LONG_NAME}
"""
# Facts of what was built: the contents of a file, or None where there is none.
BUILT_FROM_SCRATCH = {
    "data/one": "one\n",
    "data/moved/new": "new\n",
    "data/moved/two": None,
    "data/sub": None,
    "data/p/now-a-directory": "",
    "copied/a": "a\n",
    "copied/b": None,
    "copied/c": "c\nchanged\n",
    "linked": None,
    "deep": None,
    "shallow/z/b/c": "y\n",
}
BUILT_FROM_IMAGE = {
    "d4": None,
    "d5": None,
    "d6/added": "added\n",
    "d6/renamed": None,
    "d6/old": None,
    "d2/again": "again\n",
    "d2/new": None,
    "copied/hard": "a\n",
    "turns/a": None,
    "turns/file": None,
    "moved/b/c": "a\n",
    "d3": None,
    "links/a": None,
    "links/far/c": "linked\n",
    "whiteout/x": "new x\n",
}


class Engine(Protocol):
    """What the scenario asks of an engine. Commands that fail raise AssertionError with what was said."""

    name: str
    cell: Cell
    parts: frozenset[Part]
    """The optional parts that it can do; the others are left out."""
    faults: tuple[Fault, ...]
    """Where its storage is known to be wrong; empty for ours."""

    def load(self, archive: Path) -> None:
        """Load an image from a docker-archive."""

    def images(self) -> list[str]:
        """The ids or digests of all images."""

    def containers(self) -> list[str]:
        """The ids of all containers."""

    def run(self, image: str, *command: str) -> str:
        """Run a command in a new container that is removed afterwards; returns its output."""

    def start(self, image: str, name: str) -> str:
        """Start a container that sleeps; returns its id."""

    def execute(self, name: str, *command: str) -> str:
        """Run a command in a running container; returns its output."""

    def diff(self, name: str) -> list[str]:
        """The changes of a container: ``A``, ``C`` or ``D``, a space, the path without its first slash."""

    def commit(self, name: str, image: str) -> None:
        """Make an image of a container."""

    def build(self, context: Path, image: str) -> None:
        """Build an image from the Dockerfile of a directory, each step a layer."""

    def save(self, image: str, archive: Path) -> None:
        """Write an image as a docker-archive or OCI layout in a tar."""

    def export(self, name: str, archive: Path) -> None:
        """Write a container's tree as a tar."""

    def copy_in(self, source: Path, name: str, target: str) -> None:
        """Copy from the machine into a container."""

    def copy_out(self, name: str, source: str, target: Path) -> None:
        """Copy from a container to the machine."""

    def restart(self) -> None:
        """End the engine, by force, with containers running; start it again, and see those running that did."""

    def remove_all(self) -> None:
        """Remove all containers and images, and what the engine keeps of builds."""

    def leftovers(self) -> list[str]:
        """Layers that are still on disk, as directories or in the engine's own lists."""


@dataclass
class Record:
    """What an engine showed, by the name of the step."""

    trees: dict[str, Tree] = field(default_factory=dict)
    lists: dict[str, list[str]] = field(default_factory=dict)


def is_known(faults: Iterable[Fault], step: str, what: str) -> bool:
    """Whether a path or line of a step is among the known faults."""
    return any(fnmatchcase(step, one) and fnmatchcase(what, two) for one, two in faults)


def differences(ours: Record, theirs: Record, faults: Iterable[Fault] = ()) -> list[str]:
    """One line for each thing that differs.

    Args:
        ours: of the engine on our storage.
        theirs: of the engine on its own.
        faults: where it is its own storage that is known to be wrong; not looked at.
    """
    known = tuple(faults)
    lines = []
    for step in sorted(ours.trees.keys() | theirs.trees.keys()):
        one, two = ours.trees.get(step, {}), theirs.trees.get(step, {})
        for path in sorted(one.keys() | two.keys()):
            if not is_known(known, step, path) and one.get(path) != two.get(path):
                lines.append(f"{step}: {path}: ours {one.get(path)}, theirs {two.get(path)}")
    for step in sorted(ours.lists.keys() | theirs.lists.keys()):
        mine, yours = set(ours.lists.get(step, [])), set(theirs.lists.get(step, []))
        lines += [f"{step}: only ours: {line}" for line in sorted(mine - yours) if not is_known(known, step, line)]
        lines += [f"{step}: only theirs: {line}" for line in sorted(yours - mine) if not is_known(known, step, line)]
    return lines


def census(text: str) -> Tree:
    """The tree that ``/bin/census`` told of (see `awkward_image`)."""
    found: Tree = {}
    by_inode: dict[str, list[str]] = defaultdict(list)
    sums = {}
    for line in text.splitlines():
        if line.startswith("m|"):
            digest, _, path = line[2:].partition("  ")
            sums[path.removeprefix("./")] = digest
            continue
        assert line.startswith("s|"), f"census: {line!r}"
        inode, kind, mode, uid, gid, size, mtime, device, name = line[2:].split("|", 8)
        target = ""
        if kind == "symbolic link":
            name, _, target = name[1:-1].partition("' -> '")
        path = name.removeprefix("./")
        if _is_of_the_engine(path):
            continue
        kind = "regular file" if kind == "regular empty file" else kind
        entry = {"kind": kind, "mode": mode, "owner": f"{uid}:{gid}", "mtime": _time(path, int(mtime))}
        if kind != "directory":
            entry["size"] = size
            by_inode[inode].append(path)
        if kind.endswith("special file"):
            entry["device"] = device
        if target:
            entry["target"] = target
        found[path] = entry
    for path, digest in sums.items():
        if path in found:
            found[path]["md5"] = digest
    for names in by_inode.values():
        for name in names:
            if len(names) > 1:
                found[name]["links"] = " ".join(sorted(set(names) - {name}))
    return found


def listing(archive: tarfile.TarFile) -> Tree:
    """The entries of a layer or an exported tree, with extended attributes."""
    found: Tree = {}
    for member in archive:
        path = member.name.removeprefix("/").removeprefix("./").rstrip("/") or "."
        if _is_of_the_engine(path):
            continue
        entry = {
            "kind": member.type.decode(),
            "mode": f"{member.mode & 0o7777:o}",
            "owner": f"{member.uid}:{member.gid}",
            "mtime": _time(path, int(member.mtime // 1)),
        }
        if member.isreg():
            data = archive.extractfile(member)
            assert data is not None
            entry["md5"] = hashlib.md5(data.read()).hexdigest()
        if member.issym() or member.islnk():
            entry["target"] = member.linkname.removeprefix("/")
        if member.isdev():
            entry["device"] = f"{member.devmajor}:{member.devminor}"
        for name, value in member.pax_headers.items():
            if name.startswith("SCHILY.xattr."):
                entry[name.removeprefix("SCHILY.xattr.")] = repr(value)
        found[path] = entry
    return found


def saved_layers(archive: Path) -> list[tuple[str, Tree]]:
    """The digest (of the uncompressed archive) and the entries of each layer in a saved image, base first."""
    with tarfile.open(archive) as tar:

        def member(name: str) -> bytes:
            file = tar.extractfile(name)
            assert file is not None, name
            return file.read()

        found = []
        for name in json.loads(member("manifest.json"))[0]["Layers"]:
            data = member(name)
            with tarfile.open(fileobj=io.BytesIO(data), errors="surrogateescape") as layer:
                found.append((f"sha256:{hashlib.sha256(data).hexdigest()}", listing(layer)))
        return found


def play(engine: Engine, image: AwkwardImage) -> Record:
    """Drive an engine through everything; returns what it showed.

    Raises AssertionError when something is not as it has to be on any storage, or is left behind.
    """
    record = Record()
    work = engine.cell.root / "tmp" / "scenario"
    work.mkdir()
    work.chmod(0o777)

    engine.load(image.archive)
    fresh = record.trees["fresh"] = census(engine.run(TAG, "/bin/census"))
    assert_holds(fresh, {path: text for path, text in EXPECTED.items() if not is_known(engine.faults, "fresh", path)})
    assert_linked(fresh, EXPECTED_LINKS)

    # Two containers of one image: what one does, the other does not see.
    ids = [engine.start(TAG, "one"), engine.start(TAG, "two")]
    engine.execute("one", "/bin/sh", "-c", CHANGE)
    changed = record.trees["changed"] = census(engine.execute("one", "/bin/census"))
    assert without_times(census(engine.execute("two", "/bin/census"))) == without_times(fresh)
    # Whether the other names of a file that was hard-linked in a layer change with it is the storage's to say.
    assert_linked(changed, [{"made/hard", "made/deep/er/file"}])

    if "diff" in engine.parts:
        record.lists["diff"] = sorted(line for line in engine.diff("one") if not _is_of_the_engine(line[2:]))
        missing = EXPECTED_DIFF.difference(record.lists["diff"])
        lacking = [line for line in sorted(missing) if not is_known(engine.faults, "diff", line)]
        assert lacking == [], "not in the engine's diff"
    if "export" in engine.parts:
        engine.export("one", work / "export.tar")
        with tarfile.open(work / "export.tar", errors="surrogateescape") as tar:
            exported = record.trees["export"] = listing(tar)
        assert exported.keys() - {"."} == changed.keys() - {"."} - {"run", "dev", "proc", "sys"}
    if "copy" in engine.parts:
        _copy(engine, work, record)
    if "commit" in engine.parts:
        engine.commit("one", "committed")
        committed = record.trees["committed"] = census(engine.run("committed", "/bin/census"))
        assert without_times(committed, links=False) == without_times(changed, links=False)
    if "restart" in engine.parts:
        engine.restart()
        after = census(engine.execute("one", "/bin/census"))
        assert without_times(after) == without_times(changed)
        engine.execute("one", "/bin/sh", "-c", "echo lives >/lives && rm -r /made && mkdir /made")

    if "build" in engine.parts:
        context = build_context(work)
        for name, text, facts in (
            ("built-from-scratch", FROM_SCRATCH, BUILT_FROM_SCRATCH),
            ("built-from-image", FROM_IMAGE, BUILT_FROM_IMAGE),
        ):
            (context / "Dockerfile").write_text(text)
            engine.build(context, name)
            built = record.trees[name] = census(engine.run(name, "/bin/census"))
            assert_holds(built, facts)
            if "save" in engine.parts:
                engine.save(name, work / f"{name}.tar")
                layers = saved_layers(work / f"{name}.tar")
                for number, (_, tree) in enumerate(layers[-10:], start=1):
                    record.trees[f"{name}, layer {number}"] = tree
    if "save" in engine.parts:
        engine.save(TAG, work / "saved.tar")
        assert tuple(digest for digest, _ in saved_layers(work / "saved.tar")) == image.diff_ids

    def one_of_many(number: int) -> str:
        script = (
            f"echo {number} >/mine && rm -r /d1 && mv /d4 /n{number} && cat /mine /n{number}/old && ls / | grep -c ^n"
        )
        return engine.run(TAG, "/bin/sh", "-c", script)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        for number, said in enumerate(pool.map(one_of_many, range(AT_ONCE))):
            assert said == f"{number}\nold 4\n3\n", f"container {number} of those run at once says {said!r}"

    engine.remove_all()
    assert engine.containers() == []
    assert engine.images() == []
    assert engine.leftovers() == []
    _assert_no_cgroup(ids)
    return record


def assert_holds(tree: Tree, facts: dict[str, str | None]) -> None:
    """Check files' contents: a text, or None for a name that must not be there."""
    for path, text in facts.items():
        entry = tree.get(path)
        if text is None:
            assert entry is None, f"{path} is there: {entry}"
        else:
            assert entry is not None, f"{path} is not there"
            assert entry.get("md5") == hashlib.md5(text.encode()).hexdigest(), f"{path} is not {text!r}: {entry}"


def assert_linked(tree: Tree, groups: Iterable[set[str]]) -> None:
    """Check that names are one file."""
    for group in groups:
        for path in group:
            assert {path, *tree[path].get("links", "").split()} == group, f"{path}: {tree[path]}"


def without_times(tree: Tree, *, links: bool = True) -> Tree:
    """The tree without the times that reading or writing it anew changes; on request without hard links."""
    drop = {"mtime"} if links else {"mtime", "links"}
    return {path: {key: value for key, value in entry.items() if key not in drop} for path, entry in tree.items()}


def _copy(engine: Engine, work: Path, record: Record) -> None:
    source = work / "in"
    source.mkdir()
    (source / "file").write_text("copied in\n")
    engine.copy_in(source, "two", "/copied")
    assert engine.execute("two", "/bin/cat", "/copied/file") == "copied in\n"
    engine.copy_in(source / "file", "two", "/d4/old")
    assert engine.execute("two", "/bin/cat", "/d4/old") == "copied in\n"
    engine.copy_out("one", "/made", work / "out")
    found = sorted(str(path.relative_to(work / "out")) for path in (work / "out").rglob("*"))
    assert found == ["deep", "deep/er", "deep/er/file", "hard"]
    assert (work / "out/hard").read_text() == "deep\n"
    record.lists["copied out"] = found


def build_context(work: Path) -> Path:
    """A directory to build from: ``rootfs`` with a shell, and three small ``files``; the Dockerfile is the caller's."""
    context = work / "context"
    (context / "rootfs/bin").mkdir(parents=True)
    for name in ("tmp", "etc", "proc", "dev", "sys"):
        (context / "rootfs" / name).mkdir()
    busybox = shutil.which("busybox")
    assert busybox is not None, "busybox is missing; run scripts/setup --dev"
    shutil.copy(busybox, context / "rootfs/bin/busybox")
    for applet in _APPLETS.split():
        (context / "rootfs/bin" / applet).symlink_to("busybox")
    (context / "rootfs/bin/census").write_text(CENSUS)
    (context / "rootfs/bin/census").chmod(0o755)
    (context / "files").mkdir()
    for name in "abc":
        (context / "files" / name).write_text(f"{name}\n")
    return context


def _is_of_the_engine(path: str) -> bool:
    return any(path.startswith(f"{name}/") or path == name for name in _OF_THE_ENGINE)


def _time(path: str, seconds: int) -> str:
    if path in _HOLD_THE_ENGINES:
        return "any"
    return "now" if 1_600_000_000 < seconds < 4_000_000_000 else str(seconds)


def _assert_no_cgroup(ids: Iterable[str]) -> None:
    names = [(where, name) for where, names, _ in os.walk("/sys/fs/cgroup") for name in names]
    found = [f"{where}/{name}" for where, name in names if any(one in name for one in ids if one)]
    assert not found, f"control groups are left: {found}"
