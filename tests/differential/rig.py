"""Two mounts over the same lower layers, and the comparison of what they do."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tests.differential.layers import build_lowers
from tests.differential.operations import Answer, Check, Op, OpenSetXattr, Remount, RemoveXattr, SetXattr, Side
from tests.support.crash import kill, lose_unsynced
from tests.support.mounts import UnionMount, is_ours, mounted_overlay, mounted_union, wait_until
from tests.support.sandbox import new_root
from tests.support.snapshot import Snapshot, TreeFaultError, checksum_layer, differences, snapshot
from tests.support.usage import is_counted, taken_bytes, used_bytes
from unionfs.host.syscalls import syncfs


class MismatchError(AssertionError):
    """The two sides differ; ``ops`` is what was done, and replays it."""

    def __init__(self, what: str, ops: Sequence[Op]) -> None:
        self.what = what
        self.ops = tuple(ops)
        super().__init__(f"{what}\n\nops:\n{script(self.ops)}")


def _may_differ(op: Op, ours: Answer, theirs: Answer) -> bool:
    """Whether these answers are among the differences of ``docs/differences.md``."""
    missing, done = ("error", "ENODATA"), ("ok",)
    if isinstance(op, OpenSetXattr):  # the kernel cannot copy up a lower file that was renamed over
        return ours == done and theirs == ("error", "EEXIST")
    if isinstance(op, (SetXattr, RemoveXattr)) and op.name.startswith("system.posix_acl_"):
        # An ACL that is not there: ENODATA for a lower file, nothing for an upper one. A failed operation may have
        # copied the file up on one side only.
        return {ours, theirs} == {missing, done}
    return False


def script(ops: Sequence[Op]) -> str:
    """The operations as Python source, as ``tests/differential/corpus.py`` holds them."""
    return "[\n" + "".join(f"    {op!r},\n" for op in ops) + "]"


@dataclass(frozen=True, slots=True)
class Setting:
    """What is mounted on both sides."""

    name: str
    linked_lowers: bool
    """Lower layers with hard links. The kernel keeps such names together only with its index, which lives
    outside of the upper directory: no remount and no interchange then."""
    options: tuple[str, ...] = ()
    """Further options for both."""
    transport: str = ""
    without_speedups: bool = False
    """How our server talks to the kernel; empty for its own choice."""
    limited: bool = False
    """Ours counts what its upper directory holds, against a limit that is never reached."""

    @property
    def kernel_options(self) -> tuple[str, ...]:
        """What the kernel is mounted with."""
        return ("redirect_dir=on", "index=on" if self.linked_lowers else "index=off", *self.options)

    @property
    def our_options(self) -> tuple[str, ...]:
        """What ours is mounted with."""
        transport = (f"transport={self.transport}",) if self.transport and is_ours() else ()
        limit = (f"quota={1 << 30}",) if self.limited else ()
        plain = ("speedups=off",) if self.without_speedups and is_ours() else ()
        return ("redirect_dir=on", "dev", *transport, *limit, *plain, *self.options)


PLAIN = Setting("plain", linked_lowers=False)
LINKED = Setting("linked", linked_lowers=True)
METACOPY = Setting("metacopy", linked_lowers=False, options=("metacopy=on",))
SLOW = Setting("without-speedups", linked_lowers=False, without_speedups=True)
LIMITED = Setting("limited", linked_lowers=False, limited=True)
LIMITED_LINKED = Setting("limited-linked", linked_lowers=True, limited=True)
SETTINGS = {s.name: s for s in (PLAIN, SLOW, LINKED, METACOPY, LIMITED, LIMITED_LINKED)}


class Rig:
    """Ours and the kernel's union of the same lowers, each with its own upper."""

    def __init__(self, setting: Setting, root: str) -> None:
        self.setting = setting
        self.root = root
        self.done: list[Op] = []
        self.lowers = [os.path.join(root, f"l{n}") for n in (1, 2, 3)]
        build_lowers(self.lowers, setting.linked_lowers)
        self._checksums = [checksum_layer(low) for low in self.lowers]
        for name in ("ours", "theirs"):
            for part in ("upper", "work", "mnt"):
                os.makedirs(os.path.join(root, name, part))
        # File systems stamp with a coarse clock that may lie some milliseconds back.
        began_ns = time.time_ns() - 1_000_000_000
        timeless = "metacopy=on" in setting.options
        self.ours = Side("ours", os.path.join(root, "ours", "mnt"), began_ns, timeless)
        self.theirs = Side("kernel", os.path.join(root, "theirs", "mnt"), began_ns, timeless)
        self._mounts = contextlib.ExitStack()
        self._server: UnionMount | None = None

    def _part(self, name: str, part: str) -> str:
        return os.path.join(self.root, name, part)

    def mount(self) -> None:
        """Mount both."""
        part = self._part
        self._server = self._mounts.enter_context(
            mounted_union(
                self.lowers,
                part("ours", "upper"),
                part("ours", "work"),
                part("ours", "mnt"),
                self.setting.our_options,
            )
        )
        self._mounts.enter_context(
            mounted_overlay(
                self.lowers,
                part("theirs", "upper"),
                part("theirs", "work"),
                part("theirs", "mnt"),
                self.setting.kernel_options,
            )
        )

    def unmount(self) -> None:
        """Close the handles and unmount both."""
        self.ours.close_all()
        self.theirs.close_all()
        self._mounts.close()

    def _crash(self) -> None:
        """Kill our server, once programs have synced what they wrote; what it has not synced itself is lost."""
        assert self._server is not None
        self.ours.close_all()
        fd = os.open(self.ours.root, os.O_RDONLY)
        try:
            syncfs(fd)  # the kernel may still have what was written
        finally:
            os.close(fd)
        kill(self._server)
        lose_unsynced(self._part("ours", "upper"))

    def step(self, op: Op) -> None:
        """Do one operation on both and compare the result and the attributes of the names that it took."""
        self.done.append(op)
        if isinstance(op, Remount):
            if op.crash and is_ours():
                self._crash()
            self.unmount()
            self.mount()
            return
        if isinstance(op, Check):
            self.check()
            return
        theirs = op.run(self.theirs)
        ours = op.run(self.ours)
        if ours != theirs and _may_differ(op, ours, theirs):
            return
        if ours != theirs:
            raise MismatchError(f"{op!r}: ours {ours}, kernel {theirs}", self.done)
        for path in {p for name in op.paths() for p in (name, os.path.dirname(name) or ".")}:
            ours, theirs = self._attributes(self.ours, path), self._attributes(self.theirs, path)
            if ours != theirs:
                raise MismatchError(f"after {op!r}: {path!r}: ours {ours}, kernel {theirs}", self.done)

    @staticmethod
    def _attributes(side: Side, path: str) -> tuple[object, ...]:
        try:
            return side.attributes(os.lstat(side.at(path)))
        except OSError as error:
            return (error.strerror,)

    def _compare(self, what: str, ours: Snapshot, theirs: Snapshot) -> None:
        lines = differences(ours, theirs, ("ours", "kernel"))
        if lines:
            raise MismatchError(f"{what}:\n  " + "\n  ".join(lines[:20]), self.done)

    def _snapshot(self, side: Side) -> Snapshot:
        try:
            # The kernel's d_ino of a linked file below a renamed directory can be another than its st_ino.
            return snapshot(side.root, mtime=side.when, check_ino=side is self.ours and is_ours())
        except (TreeFaultError, OSError) as error:
            raise MismatchError(f"tree of {side.name}: {error}", self.done) from error

    def check(self) -> tuple[Snapshot, Snapshot]:
        """Compare the whole trees."""
        ours, theirs = self._snapshot(self.ours), self._snapshot(self.theirs)
        self._compare("trees differ", ours, theirs)
        return ours, theirs

    def _check_count(self) -> None:
        """What is shown as used is what is on the disk, once nobody has anything open that has no name."""
        self.ours.close_all()
        upper, work = self._part("ours", "upper"), self._part("ours", "work/work")
        if not wait_until(lambda: is_counted(self.ours.root, upper, work), 10):
            found = f"{used_bytes(self.ours.root)} bytes shown as used, {taken_bytes(upper, work)} and less are"
            raise MismatchError(found, self.done)

    def finish(self) -> None:
        """The last comparison: trees, lowers, and each upper mounted by the other side."""
        ours, theirs = self.check()
        if self.setting.limited:
            self._check_count()
        self.unmount()
        for low, before in zip(self.lowers, self._checksums, strict=True):
            if checksum_layer(low) != before:
                raise MismatchError(f"lower layer {low} was changed", self.done)
        if self.setting.linked_lowers:
            return
        work = self._part("ours", "work.kernel")
        os.mkdir(work)
        upper, target = self._part("ours", "upper"), self.theirs.root
        with mounted_overlay(self.lowers, upper, work, target, self.setting.kernel_options):
            self._compare("our upper mounted by the kernel differs", ours, self._snapshot(self.theirs))
        work = self._part("theirs", "work.ours")
        os.mkdir(work)
        upper, target = self._part("theirs", "upper"), self.ours.root
        with mounted_union(self.lowers, upper, work, target, self.setting.our_options):
            self._compare("the kernel's upper mounted by us differs", self._snapshot(self.ours), theirs)

    def existing(self) -> list[tuple[str, bool]]:
        """Every path of the kernel's tree, and whether it is a directory; the root first."""
        found = [(".", True)]
        stack = [""]
        while stack:
            prefix = stack.pop()
            with os.scandir(self.theirs.at(prefix)) as entries:
                for e in sorted(entries, key=lambda e: e.name):
                    is_dir = e.is_dir(follow_symlinks=False)
                    found.append((prefix + e.name, is_dir))
                    if is_dir:
                        stack.append(prefix + e.name + "/")
        return found


@contextlib.contextmanager
def rig_for(setting: Setting) -> Iterator[Rig]:
    """A mounted rig, taken down and removed whatever happens."""
    root = new_root()
    # pyfuse3 leaves the umask to the kernel, which applies it where a default ACL should: see docs/differences.md.
    umask = os.umask(0)
    rig = Rig(setting, root)
    try:
        rig.mount()
        yield rig
    finally:
        rig.unmount()
        os.umask(umask)
        shutil.rmtree(root, ignore_errors=True)


def replay(setting: Setting, ops: Sequence[Op]) -> None:
    """Run operations from the start and compare; raises MismatchError."""
    with rig_for(setting) as rig:
        for op in ops:
            rig.step(op)
        rig.finish()


def minimize(setting: Setting, failure: MismatchError, budget_s: float = 60.0) -> MismatchError:
    """Leave out operations as long as some mismatch remains."""
    deadline = time.monotonic() + budget_s
    best = failure
    chunk = max(1, len(best.ops) // 2)
    while True:
        at = 0
        while at < len(best.ops):
            if time.monotonic() > deadline:
                return best
            try:
                replay(setting, best.ops[:at] + best.ops[at + chunk :])
            except MismatchError as smaller:
                best = smaller
            else:
                at += chunk
        if chunk == 1:
            return best
        chunk //= 2
