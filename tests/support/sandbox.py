"""One test's layers, mount point and mounts; a pytest plugin that offers them as the fixture ``box``.

A test module asks for it with ``pytest_plugins = ["tests.support.sandbox"]``.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence

import pytest

from tests.support.layers import OLD_NS, Layer
from tests.support.mounts import (
    KERNEL_OPTIONS,
    UnionMount,
    is_mounted,
    mounted_overlay,
    mounted_union,
    servers_of,
    take_down,
)
from tests.support.snapshot import Snapshot, assert_same, checksum_layer, snapshot
from tests.support.syscalls import unshare_mounts


class Sandbox:
    """Directories under one root: lower layers top first, an upper, a work directory, a mount point.

    The lowers are checked to be unchanged when the test is over.
    """

    def __init__(self, root: str) -> None:
        self.root = root
        self.lowers: list[str] = []
        self.upper: str | None = self.new_dir("upper")
        self.work: str | None = self.new_dir("work")
        self.target = self.new_dir("mnt")
        self._checksums: dict[str, str] = {}
        self._huge: set[str] = set()
        self._own: set[str] = set()

    def new_dir(self, name: str) -> str:
        """A directory beside the layers."""
        path = os.path.join(self.root, name)
        os.makedirs(path)
        return path

    def lower(self, path: str | None = None, *, huge: bool = False) -> Layer:
        """A further layer, below those made before; of a ``huge`` one only the attributes are checksummed."""
        if path is None:
            path = self.new_dir(f"lower{len(self.lowers) + 1}")
            self._own.add(path)
        self.lowers.append(path)
        os.utime(path, ns=(OLD_NS, OLD_NS))
        if huge:
            self._huge.add(path)
        return Layer(path)

    def fresh_upper(self, name: str) -> None:
        """Go on with another upper and work directory."""
        self.upper, self.work = self.new_dir(name), self.new_dir(name + ".work")

    def at(self, path: str = "") -> str:
        """A path in the mount."""
        return os.path.join(self.target, path)

    def in_upper(self, path: str = "") -> str:
        """A path in the upper directory."""
        assert self.upper is not None
        return os.path.join(self.upper, path)

    def freeze(self) -> None:
        """Remember what the lowers are; done by the first mount."""
        for low in self.lowers:
            if low not in self._checksums:
                self._checksums[low] = checksum_layer(low, content=low not in self._huge)

    def thaw(self) -> None:
        """The test has to change the lowers from now on, to be able to remove them."""
        self._checksums.clear()

    def check_lowers(self, *, own: bool = False) -> None:
        """Fail when a lower layer is not what it was; with ``own`` only those that the sandbox made itself."""
        for low, before in self._checksums.items():
            if not own or low in self._own:
                now = checksum_layer(low, content=low not in self._huge)
                assert now == before, f"lower layer {low} was changed"

    @contextlib.contextmanager
    def mount(self, *options: str, lowers: Sequence[str] | None = None) -> Iterator[UnionMount]:
        """Our mount of the layers."""
        self.freeze()
        with mounted_union(lowers or self.lowers, self.upper, self.work, self.target, options) as here:
            yield here
        self.check_lowers()

    @contextlib.contextmanager
    def kernel(self, *options: str, lowers: Sequence[str] | None = None) -> Iterator[str]:
        """The kernel's mount of the same layers."""
        self.freeze()
        words = options or KERNEL_OPTIONS
        with mounted_overlay(lowers or self.lowers, self.upper, self.work, self.target, words) as here:
            yield here

    def kernel_snapshot(self, *options: str) -> Snapshot:
        """The tree that the kernel shows for the layers as they are now."""
        with self.kernel(*options) as here:
            return snapshot(here, check_ino=False)

    def union_snapshot(self, *options: str) -> Snapshot:
        """The tree that our mount shows for the layers as they are now."""
        with self.mount(*options):
            return snapshot(self.target)

    def assert_kernel_agrees(self, *options: str) -> None:
        """What the upper holds now is the same tree for the kernel and for a new mount of ours."""
        assert_same(self.union_snapshot(), self.kernel_snapshot(*options), ("ours", "kernel"))

    def clean_up(self) -> None:
        """Unmount whatever a failed test left."""
        with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as f:
            left = [line.split()[4] for line in f if line.split()[4].startswith(self.root + "/")]
        for path in reversed(left):
            take_down(path, servers_of(path))
        assert not left, f"left mounted: {left}"


DISK = "/var/tmp"
"""What is on a disk also where ``/tmp`` is in memory."""


def new_root(*, disk: bool = False) -> str:
    """A fresh directory that every user may enter, unlike pytest's own; with ``disk`` one that is not in memory."""
    root = tempfile.mkdtemp(prefix="unionfs-test-", dir=DISK if disk else None)
    os.chmod(root, 0o755)
    return root


@pytest.fixture
def box(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Sandbox]:
    """A sandbox of this test's own, on the direct transport unless ``UNIONFS_TRANSPORT`` names another.

    That both say the same is the contract suite's to hold; ``scripts/test --pure`` runs the tests of mounts on pyfuse3.
    """
    monkeypatch.setenv("UNIONFS_TRANSPORT", os.environ.get("UNIONFS_TRANSPORT", "direct"))
    yield from _sandbox(request)


@pytest.fixture
def direct_box(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Sandbox]:
    """A sandbox for what only the direct transport can do."""
    monkeypatch.setenv("UNIONFS_TRANSPORT", "direct")
    yield from _sandbox(request)


def _sandbox(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    sandbox = Sandbox(new_root(disk=request.node.get_closest_marker("disk") is not None))
    try:
        try:
            yield sandbox
        finally:
            sandbox.clean_up()
        sandbox.check_lowers(own=True)
        assert not is_mounted(sandbox.target)
        assert not servers_of(sandbox.target)
    finally:
        shutil.rmtree(sandbox.root, ignore_errors=True)


_namespaces: list[str] = []


def needs_root() -> None:
    """Skip a module where the machine cannot run it; give the test run mounts of its own where it can.

    A mount namespace that some other program on the machine makes meanwhile would have copies of our mounts, and
    keep their servers alive after we have unmounted.
    """
    if os.geteuid() != 0 or not os.path.exists("/dev/fuse"):
        pytest.skip("needs root and /dev/fuse", allow_module_level=True)
    if not _namespaces:
        unshare_mounts()
        _namespaces.append(os.readlink("/proc/self/ns/mnt"))
