"""Random operations on our mount and on the kernel's overlayfs: same answers, same tree, exchangeable uppers.

``UNIONFS_DIFFERENTIAL_EXAMPLES=2000`` runs longer, with new random operations each time. A failure prints the
shortest list of operations found; add it to ``corpus.py``.
"""

from __future__ import annotations

import os
import stat
import struct
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NoReturn

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.errors import FlakyFailure
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from tests.differential import operations as op
from tests.differential.corpus import DIRECT as DIRECT_CORPUS
from tests.differential.corpus import LINKED as LINKED_CORPUS
from tests.differential.corpus import PLAIN as PLAIN_CORPUS
from tests.differential.layers import LONG_NAME, ODD_NAME
from tests.differential.rig import (
    LINKED,
    METACOPY,
    PLAIN,
    SETTINGS,
    MismatchError,
    Rig,
    Setting,
    minimize,
    replay,
    rig_for,
)
from tests.support.layers import OLD_NS
from tests.support.mounts import is_ours, transports
from tests.support.sandbox import needs_root

pytestmark = [pytest.mark.differential]

needs_root()

EXAMPLES = int(os.environ.get("UNIONFS_DIFFERENTIAL_EXAMPLES", "0"))
STEPS = 60
STEPS_BETWEEN_CHECKS = 20

NAMES = st.sampled_from(
    ["a", "b", "c", "d", "e", "f", "new", "x", "gone", "old", "h", "m", ODD_NAME, LONG_NAME, "n" * 256]
)
SIZES = st.sampled_from([0, 1, 100, 4095, 4096, 4097, 20_000, 131_072, 200_000])
SEEDS = st.integers(0, 200)
MODES = st.sampled_from([0o644, 0o600, 0o755, 0o4755, 0o2755, 0o6711, 0o1777, 0, 0o444, 0o2775, 0o2644])
OWNERS = st.sampled_from([0, 1000, 1001, 65534, -1])
TIMES = st.sampled_from([0, OLD_NS, -1, -1_000_000_000, -999_999_999_999_999, 1, 4_000_000_000_000_000_000, OLD_NS + 1])
# 4e18 lies after this run's beginning and is thus "now" on both sides: only that it is accepted is compared.
XATTRS = st.sampled_from(
    [
        "user.one",
        "user.new",
        "trusted.two",
        "trusted.new",
        "trusted.overlay.opaque",
        "trusted.overlay.x",
        "security.x",
        "bad",
    ]
)
VALUES = st.sampled_from([b"", b"y", b"value", b"\0\xff", b"v" * 1000])
SLOTS = st.integers(0, 2)
CAPABILITY = struct.pack("<IIIII", 0x02000001, 1 << 13, 0, 0, 0)  # CAP_NET_RAW, permitted and effective


def acl(*entries: tuple[int, int, int]) -> bytes:
    """An ACL attribute of (tag, permissions, id)."""
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *e) for e in entries)


NOBODY = 0xFFFFFFFF
ACLS = st.sampled_from(
    [
        acl((1, 6, NOBODY), (2, 6, 1000), (4, 4, NOBODY), (16, 6, NOBODY), (32, 0, NOBODY)),
        acl((1, 7, NOBODY), (2, 0, 1000), (4, 5, NOBODY), (8, 7, 50), (16, 7, NOBODY), (32, 5, NOBODY)),
        acl((1, 7, NOBODY), (4, 5, NOBODY), (32, 5, NOBODY)),  # nothing that the mode does not say
        acl((1, 7, NOBODY), (2, 7, 1000)),  # incomplete
        b"",
    ]
)
USERS = st.sampled_from([0, 0, 0, 0, 0, 1000])
OPEN_FLAGS = st.sampled_from(
    [
        os.O_RDONLY,
        os.O_RDWR,
        os.O_WRONLY,
        os.O_RDWR | os.O_APPEND,
        os.O_RDWR | os.O_CREAT,
        os.O_RDWR | os.O_TRUNC,
        os.O_RDWR | os.O_CREAT | os.O_EXCL,
        os.O_RDONLY | os.O_DIRECTORY,
        os.O_RDONLY | os.O_NOFOLLOW,
    ]
)


class UnionMachine(RuleBasedStateMachine):
    """Draws operations that fit the tree as it is, or nearly."""

    setting: Setting = PLAIN
    steps = 0

    def __init__(self) -> None:
        super().__init__()
        self._entered = rig_for(self.setting)
        self.rig: Rig = self._entered.__enter__()
        self._tree: list[tuple[str, bool]] | None = None
        self._failed = False

    def _do(self, operation: op.Op) -> None:
        type(self).steps += 1
        self._tree = None
        try:
            self.rig.step(operation)
            if len(self.rig.done) % STEPS_BETWEEN_CHECKS == 0:
                self.rig.check()
        except BaseException:
            self._failed = True
            raise

    def teardown(self) -> None:
        try:
            if not self._failed:
                self.rig.finish()
        finally:
            self._entered.__exit__(None, None, None)

    def _paths(self, wanted: Callable[[bool], bool] = lambda is_dir: True) -> list[str]:
        if self._tree is None:
            self._tree = self.rig.existing()
        return [path for path, is_dir in self._tree if wanted(is_dir)] or ["."]

    def _any(self, data: Any) -> str:
        return str(data.draw(st.sampled_from(self._paths())))

    def _file(self, data: Any) -> str:
        # Now and then another kind, to see the errno.
        paths = self._paths() if data.draw(st.integers(0, 9)) == 9 else self._paths(lambda is_dir: not is_dir)
        return str(data.draw(st.sampled_from(paths)))

    def _dir(self, data: Any) -> str:
        return str(data.draw(st.sampled_from(self._paths(lambda is_dir: is_dir))))

    def _new(self, data: Any) -> str:
        return os.path.normpath(os.path.join(self._dir(data), data.draw(NAMES)))

    def _new_or_any(self, data: Any) -> str:
        return self._any(data) if data.draw(st.integers(0, 3)) == 3 else self._new(data)

    @initialize()
    def look(self) -> None:
        """An example without any rule still compares the untouched trees."""
        self.rig.check()

    @rule(data=st.data(), mode=MODES, exclusive=st.booleans(), uid=USERS)
    def create(self, data: Any, mode: int, exclusive: bool, uid: int) -> None:
        self._do(op.Create(path=self._new_or_any(data), mode=mode, exclusive=exclusive, uid=uid))

    @rule(data=st.data(), offset=SIZES, length=SIZES, seed=SEEDS, uid=USERS)
    def write(self, data: Any, offset: int, length: int, seed: int, uid: int) -> None:
        self._do(op.Write(path=self._file(data), offset=offset, seed=seed, length=length, uid=uid))

    @rule(data=st.data(), length=SIZES, seed=SEEDS, uid=USERS)
    def append(self, data: Any, length: int, seed: int, uid: int) -> None:
        self._do(op.Append(path=self._file(data), seed=seed, length=length, uid=uid))

    @rule(data=st.data(), length=SIZES, seed=SEEDS, uid=USERS)
    def overwrite(self, data: Any, length: int, seed: int, uid: int) -> None:
        self._do(op.Overwrite(path=self._file(data), seed=seed, length=length, uid=uid))

    @rule(data=st.data(), size=SIZES, uid=USERS)
    def truncate(self, data: Any, size: int, uid: int) -> None:
        self._do(op.Truncate(path=self._file(data), size=size, uid=uid))

    @rule(data=st.data())
    def read(self, data: Any) -> None:
        self._do(op.Read(path=self._file(data)))

    @rule(data=st.data(), flags=st.sampled_from([0, 0, 1, 2]), uid=USERS)
    def rename_any(self, data: Any, flags: int, uid: int) -> None:
        dst = self._any(data) if flags == 2 else self._new_or_any(data)
        self._do(op.Rename(src=self._any(data), dst=dst, flags=flags, uid=uid))

    @rule(data=st.data(), flags=st.sampled_from([0, 0, 0, 2]))
    def rename_dir(self, data: Any, flags: int) -> None:
        dst = self._any(data) if flags == 2 else self._new_or_any(data)
        self._do(op.Rename(src=self._dir(data), dst=dst, flags=flags))

    @rule(data=st.data(), uid=USERS)
    def link(self, data: Any, uid: int) -> None:
        self._do(op.Link(src=self._file(data), dst=self._new_or_any(data), uid=uid))

    @rule(data=st.data(), uid=USERS)
    def unlink(self, data: Any, uid: int) -> None:
        self._do(op.Unlink(path=self._file(data), uid=uid))

    @rule(data=st.data(), uid=USERS)
    def rmdir(self, data: Any, uid: int) -> None:
        self._do(op.Rmdir(path=self._dir(data), uid=uid))

    @rule(data=st.data())
    def remove_tree(self, data: Any) -> None:
        path = self._dir(data)
        if path != ".":
            self._do(op.RemoveTree(path=path))
            if data.draw(st.booleans()):
                self._do(op.Mkdir(path=path))

    @rule(data=st.data(), mode=MODES, uid=USERS)
    def mkdir(self, data: Any, mode: int, uid: int) -> None:
        self._do(op.Mkdir(path=self._new(data), mode=mode, uid=uid))

    @rule(data=st.data(), text=st.sampled_from(["a", "../d", ".", "d/e", "nowhere", "x" * 4095]), uid=USERS)
    def symlink(self, data: Any, text: str, uid: int) -> None:
        self._do(op.Symlink(target=text, path=self._new(data), uid=uid))

    @rule(
        data=st.data(),
        what=st.sampled_from(
            [
                (stat.S_IFIFO, 0, 0),
                (stat.S_IFSOCK, 0, 0),
                (stat.S_IFCHR, 1, 3),
                (stat.S_IFBLK, 7, 300),
                (stat.S_IFREG, 0, 0),
            ]
        ),
        uid=USERS,
    )
    def mknod(self, data: Any, what: tuple[int, int, int], uid: int) -> None:
        self._do(op.Mknod(path=self._new(data), kind=what[0], major=what[1], minor=what[2], uid=uid))

    @rule(data=st.data(), mode=MODES, uid=USERS)
    def chmod(self, data: Any, mode: int, uid: int) -> None:
        self._do(op.Chmod(path=self._any(data), mode=mode, uid=uid))

    @rule(data=st.data(), owner=OWNERS, group=OWNERS, uid=USERS)
    def chown(self, data: Any, owner: int, group: int, uid: int) -> None:
        self._do(op.Chown(path=self._any(data), owner=owner, group=group, uid=uid))

    @rule(data=st.data(), atime_ns=TIMES, mtime_ns=TIMES, uid=USERS)
    def utimens(self, data: Any, atime_ns: int, mtime_ns: int, uid: int) -> None:
        self._do(op.Utimens(path=self._any(data), atime_ns=atime_ns, mtime_ns=mtime_ns, uid=uid))

    @rule(
        data=st.data(),
        name=XATTRS,
        value=VALUES,
        flags=st.sampled_from([0, 0, os.XATTR_CREATE, os.XATTR_REPLACE]),
        uid=USERS,
    )
    def setxattr(self, data: Any, name: str, value: bytes, flags: int, uid: int) -> None:
        self._do(op.SetXattr(path=self._any(data), name=name, value=value, flags=flags, uid=uid))

    @rule(data=st.data(), name=XATTRS, uid=USERS)
    def removexattr(self, data: Any, name: str, uid: int) -> None:
        self._do(op.RemoveXattr(path=self._any(data), name=name, uid=uid))

    @rule(data=st.data(), name=XATTRS, uid=USERS)
    def getxattr(self, data: Any, name: str, uid: int) -> None:
        self._do(op.GetXattr(path=self._any(data), name=name, uid=uid))

    @rule(data=st.data(), follow=st.booleans(), uid=USERS)
    def stat(self, data: Any, follow: bool, uid: int) -> None:
        self._do(op.Stat(path=self._new_or_any(data), follow=follow, uid=uid))

    @rule(data=st.data(), uid=USERS)
    def listdir(self, data: Any, uid: int) -> None:
        self._do(op.ListDir(path=self._dir(data), uid=uid))

    @rule(data=st.data(), slot=SLOTS, flags=OPEN_FLAGS, uid=USERS)
    def open_file(self, data: Any, slot: int, flags: int, uid: int) -> None:
        path = self._new_or_any(data) if flags & os.O_CREAT else self._any(data)
        self._do(op.Open(slot=slot, path=path, flags=flags, uid=uid))

    @rule(slot=SLOTS, offset=SIZES, length=SIZES, seed=SEEDS)
    def use_open_write(self, slot: int, offset: int, length: int, seed: int) -> None:
        self._do(op.OpenWrite(slot=slot, offset=offset, seed=seed, length=length))

    @rule(slot=SLOTS, offset=SIZES, length=SIZES)
    def use_open_read(self, slot: int, offset: int, length: int) -> None:
        self._do(op.OpenRead(slot=slot, offset=offset, length=length))

    @rule(
        what=st.one_of(
            st.builds(op.OpenStat, slot=SLOTS),
            st.builds(op.OpenTruncate, slot=SLOTS, size=SIZES),
            st.builds(op.OpenChmod, slot=SLOTS, mode=MODES),
            st.builds(op.OpenChown, slot=SLOTS, owner=OWNERS, group=OWNERS),
            st.builds(op.OpenUtimens, slot=SLOTS, mtime_ns=TIMES),
            st.builds(op.OpenSetXattr, slot=SLOTS, name=XATTRS, value=VALUES),
            st.builds(op.OpenSync, slot=SLOTS),
            st.builds(op.OpenList, slot=SLOTS),
            st.builds(op.Close, slot=SLOTS),
        )
    )
    def use_open(self, what: op.Op) -> None:
        self._do(what)

    @rule(
        data=st.data(),
        name=st.sampled_from(["system.posix_acl_access", "system.posix_acl_default"]),
        value=ACLS,
        uid=USERS,
    )
    def set_acl(self, data: Any, name: str, value: bytes, uid: int) -> None:
        self._do(op.SetXattr(path=self._any(data), name=name, value=value, uid=uid))

    @rule(data=st.data())
    def set_capability(self, data: Any) -> None:
        self._do(op.SetXattr(path=self._file(data), name="security.capability", value=CAPABILITY))

    @rule(chance=st.integers(0, 5))
    def forget(self, chance: int) -> None:
        if chance == 0:
            self._do(op.Forget())

    @rule(chance=st.integers(0, 3), crash=st.booleans())
    def remount(self, chance: int, crash: bool) -> None:
        if chance == 0 and not self.setting.linked_lowers:
            self._do(op.Remount(crash=crash))


def run(setting: Setting, examples: int) -> None:
    """Run the machine; a mismatch is made small before it is reported."""

    class Machine(UnionMachine):
        steps = 0

    Machine.setting = setting
    longer = EXAMPLES > 0
    config = settings(
        max_examples=EXAMPLES or examples,
        stateful_step_count=STEPS,
        derandomize=not longer,
        database=None,
        deadline=None,
        phases=[Phase.generate],  # our own reduction needs far fewer mounts than hypothesis' shrinking
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )
    began = time.monotonic()
    try:
        run_state_machine_as_test(Machine, settings=config)
    except MismatchError as failure:
        report(setting, failure)
    except FlakyFailure as failures:  # did not fail again when hypothesis repeated it: a race
        for one in failures.exceptions:
            if isinstance(one, MismatchError):
                report(setting, one)
        raise
    seconds = time.monotonic() - began
    print(f"{setting.name}, {setting.transport}: {Machine.steps} operations compared in {seconds:.0f} s")
    assert Machine.steps > 10 * (EXAMPLES or examples), "the machine hardly did anything"


def report(setting: Setting, failure: MismatchError) -> NoReturn:
    """Fail with the shortest list of operations found."""
    smallest = minimize(setting, failure)
    pytest.fail(
        f"{setting.name}, {setting.transport}: {smallest.what}\nreplay with:\n{op_script(smallest)}", pytrace=False
    )


def op_script(failure: MismatchError) -> str:
    """The operations of a failure as source."""
    return str(failure).partition("ops:\n")[2]


# 9,000 operations in about two minutes. The direct transport is what most mounts use.
RUNS = [
    ("plain", "direct", 60),
    ("plain", "pyfuse3", 30),
    ("without-speedups", "direct", 20),
    ("without-speedups", "pyfuse3", 10),
    ("linked", "direct", 30),
    ("linked", "pyfuse3", 10),
    ("metacopy", "direct", 20),
    ("metacopy", "pyfuse3", 10),
    ("limited", "direct", 15),
    ("limited", "pyfuse3", 5),
    ("limited-linked", "direct", 5),
]


@pytest.mark.timeout(7200 if EXAMPLES else 300)
@pytest.mark.parametrize(("name", "transport", "examples"), [r for r in RUNS if r[1] in transports() or not is_ours()])
def test_same_operations_give_the_same_tree(name: str, transport: str, examples: int) -> None:
    run(replace(SETTINGS[name], transport=transport), examples)


@pytest.mark.parametrize("transport", transports())
@pytest.mark.parametrize("name", sorted(PLAIN_CORPUS))
@pytest.mark.parametrize("setting", [PLAIN, METACOPY], ids=lambda s: s.name)
def test_corpus(setting: Setting, name: str, transport: str) -> None:
    replay(replace(setting, transport=transport), PLAIN_CORPUS[name])


@pytest.mark.parametrize("name", sorted(DIRECT_CORPUS))
@pytest.mark.parametrize("setting", [PLAIN, METACOPY], ids=lambda s: s.name)
def test_corpus_of_the_direct_transport(setting: Setting, name: str) -> None:
    replay(replace(setting, transport="direct"), DIRECT_CORPUS[name])


@pytest.mark.parametrize("transport", transports())
@pytest.mark.parametrize("name", sorted(LINKED_CORPUS))
def test_corpus_with_hard_linked_lowers(name: str, transport: str) -> None:
    replay(replace(LINKED, transport=transport), LINKED_CORPUS[name])
