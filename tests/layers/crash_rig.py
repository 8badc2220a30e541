"""``python -m tests.layers.crash_rig DRIVER OPERATION DIRECTORY HOW``: dies at the steps of an operation, and looks.

For every change to the disk that the operation makes, the same store is set up, the operation is killed right before
that change, and a fresh process opens the store: it must find the state from before or from after, all that was
committed whole, and nothing half done left.
"""

from __future__ import annotations

import gc
import io
import os
import shutil
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from tests.layers.archives import archive, hard_link, member, symlink
from tests.layers.conftest import Workshop, write
from tests.layers.dying import run_and_kill, run_and_watch
from unionfs.drivers.contract import SyncingDriver
from unionfs.layers.fsck import fsck
from unionfs.layers.gc import collect
from unionfs.layers.identity import create_chain_id, diff_id_of

BASE = archive([member("etc/"), member("etc/conf", "base"), member("gone", "1"), symlink("l", "etc")])
TOP = archive([member("etc/"), member("etc/conf", "top"), member(".wh.gone"), hard_link("same", "etc/conf")])
MORE = archive([member("new/"), member("new/file", "n" * 5000), member("new/file", "again"), member("etc/.wh.conf")])
BASE_ID = create_chain_id([diff_id_of(BASE)])
TOP_ID = create_chain_id([diff_id_of(BASE), diff_id_of(TOP)])
TREE = "ad" * 32
MORE_ID = create_chain_id([diff_id_of(BASE), diff_id_of(TOP), diff_id_of(MORE)])


def template(shop: Workshop) -> None:
    """What the operations start from: two layers, a container on the upper one, a layer that nobody uses."""
    base = shop.store.register(io.BytesIO(BASE))
    shop.store.register(io.BytesIO(TOP), base.chain_id)
    shop.store.register(io.BytesIO(MORE))
    rw = shop.store.create_rw_layer("container", TOP_ID, init=write("etc/hostname", "container"))
    with rw.mounted() as path:
        write("data", "precious")(path)
        os.unlink(os.path.join(path, "etc/conf"))


def reopen(_: Workshop) -> None:
    """Nothing but opening the store, see :func:`main`."""


def register(shop: Workshop) -> None:
    """Two passes over the stream, because it has a name twice."""
    shop.store.register(io.BytesIO(MORE), TOP_ID)


def register_again(shop: Workshop) -> None:
    """The tree of a layer that is there already is dropped."""
    shop.store.register(io.BytesIO(TOP), BASE_ID)


def release(shop: Workshop) -> None:
    """A layer that nobody uses goes."""
    shop.store.release(shop.store.get(create_chain_id([diff_id_of(MORE)])))


def create(shop: Workshop) -> None:
    """With an init layer."""
    shop.store.create_rw_layer("new", TOP_ID, init=write("etc/hostname", "new"))


def remove(shop: Workshop) -> None:
    """A container goes, and the layers that only it used."""
    shop.store.release_rw_layer(shop.store.get_rw_layer("container"))


def commit(shop: Workshop) -> None:
    """A container's changes become a layer."""
    with shop.store.get_rw_layer("container").tar_stream() as stream:
        shop.store.register(stream, TOP_ID)


def collect_garbage(shop: Workshop) -> None:
    """All that nobody uses goes."""
    collect(shop.store, layers=True)


def adopt(shop: Workshop) -> None:
    """A container's tree that a driver has becomes a read-write layer."""
    shop.store.adopt_rw_layer("adopted", TREE, TOP_ID)


def make_tree(shop: Workshop) -> None:
    """What is adopted, on the disk before the operation begins."""
    driver = shop.store.driver
    driver.create_read_write(TREE, shop.store.map()[TOP_ID].cache_id)
    write("data", "somebody's")(driver.get(TREE))
    driver.put(TREE)
    assert isinstance(driver, SyncingDriver)
    driver.sync(TREE)


OPERATIONS: dict[str, Callable[[Workshop], None]] = {
    function.__name__: function
    for function in (reopen, register, register_again, release, create, remove, commit, adopt, collect_garbage)
}

# What the operation may have done by the time it died.
MAY_GO = {
    "release": {create_chain_id([diff_id_of(MORE)])},
    "collect_garbage": {create_chain_id([diff_id_of(MORE)])},
    "remove": {TOP_ID, BASE_ID},
}


def check(shop: Workshop, operation: str, finished: bool) -> None:
    """The state of a store whose last user died, or came to its end."""
    store = shop.store
    assert store.unreadable == [], store.unreadable
    committed = {BASE_ID, TOP_ID, create_chain_id([diff_id_of(MORE)])}
    layers = store.map()
    assert committed - layers.keys() <= MAY_GO.get(operation, set()), "a committed layer is lost"
    if operation == "adopt":
        assert not finished or "adopted" in store.rw_layers()
        # It was there before and is somebody's, so it is never taken for something half done.
        with store.adopt_rw_layer("adopted", TREE, TOP_ID).mounted() as path:
            assert Path(path, "data").read_text() == "somebody's"
    problems = fsck(store, deep=True)
    assert problems == [], problems
    shop.assert_nothing_leaked()
    names = set(store.rw_layers())
    if operation != "remove":
        assert "container" in names
        assert {TOP_ID, BASE_ID} <= layers.keys()
    if "container" in names:
        assert {TOP_ID, BASE_ID} <= layers.keys()
        with store.get_rw_layer("container").mounted() as path:
            assert Path(path, "data").read_text() == "precious"
            assert Path(path, "etc/hostname").read_text() == "container"
            assert not Path(path, "etc/conf").exists()
    if "new" in names:
        with store.get_rw_layer("new").mounted() as path:
            assert Path(path, "etc/hostname").read_text() == "new"
    if finished:
        assert ("new" in names) == (operation == "create")
        assert ("container" in names) == (operation != "remove")
        assert (MORE_ID in layers) == (operation == "register")
        counts = {"register": 4, "commit": 4, "release": 2, "collect_garbage": 2, "remove": 1}
        assert len(layers) == counts.get(operation, 3)
    # Whatever happened, the same thing works now.
    if MORE_ID not in layers and TOP_ID in layers:
        assert store.register(io.BytesIO(MORE), TOP_ID).verify() == len(MORE)
    store.cleanup()
    store.close()


def in_child(function: Callable[[], None]) -> None:
    """Run ``function`` in a process of its own; its failure is ours."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            function()
            status = 0
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    assert status == 0, "see above"


class Rig:
    """One operation on one driver, in the directory ``work``."""

    def __init__(self, driver: str, operation: str, work: str) -> None:
        self.driver = driver
        self.operation = operation
        self.work = work

    def set_up(self) -> None:
        """Make what the operation starts from."""
        shop = Workshop(Path(self.work), self.driver)
        template(shop)
        shop.store.cleanup()
        shop.store.close()

    def operate(self, begin: Callable[[], None]) -> None:
        """The operation itself; what counts are its own changes, not those of opening the store before."""
        if self.operation == "reopen":
            begin()
        shop = Workshop(Path(self.work), self.driver)
        if self.operation == "adopt":
            make_tree(shop)
        if self.operation != "reopen":
            begin()
        OPERATIONS[self.operation](shop)
        shop.store.close()

    def look(self, when: str, finished: bool) -> None:
        """Check in a new process what the death left."""
        try:
            in_child(lambda: check(Workshop(Path(self.work), self.driver), self.operation, finished))
        except AssertionError:
            print(f"{self.driver}: {self.operation}: {when}: see above")
            raise
        # What the checking process mounted ended with it, or is of a server that is being ended.
        subprocess.run(["umount", "--quiet", "--all-targets", "--recursive", self.work], check=False)


def kill(rig: Rig, directory: str, stride: int) -> None:
    """The process dies at each of its changes, or at every ``stride``-th."""
    ready = os.path.join(directory, "ready")
    in_child(rig.set_up)
    os.rename(rig.work, ready)
    at = 1 - stride
    killed = True
    calls = []
    while killed:
        at += stride
        subprocess.run(["cp", "-a", ready, rig.work], check=True, stdin=subprocess.DEVNULL)
        killed, call = run_and_kill(rig.operate, rig.work, at)
        calls.append(call)
        rig.look(f"killed at change {at} ({call or 'none, it finished'})", not killed)
        shutil.rmtree(rig.work)
    print(f"{rig.driver}: {rig.operation}: died {len(calls) - 1} times, at {', '.join(calls[:-1])}")


def cut_power(rig: Rig, directory: str) -> None:
    """The machine loses its power at each moment at which something new has reached the disk.

    The store lies on a file system in an image. What is in that image, while the operation is stopped before one of its
    changes, is what a disk would hold then: everything that was not synced is still in the kernel's memory.
    """
    disk = os.path.dirname(rig.work)
    image = os.path.join(directory, "disk.img")
    os.makedirs(disk)
    with open(image, "wb") as file:
        file.truncate(_IMAGE_BYTES)
    subprocess.run(["mkfs.ext4", "-q", "-J", "size=4", image], check=True)
    _mount(image, disk)
    in_child(rig.set_up)
    subprocess.run(["sync", "--file-system", disk], check=True)
    subprocess.run(["umount", disk], check=True)
    _mount(image, disk)
    states: list[tuple[str, str]] = []

    def keep(when: str) -> None:
        state = os.path.join(directory, f"cut-{len(states)}.img")
        subprocess.run(["cp", "--sparse=always", image, state], check=True)
        if states and subprocess.run(["cmp", "--quiet", state, states[-1][0]], check=False).returncode == 0:
            os.unlink(state)
            # The same state is the result of the later of the two.
            states[-1] = (states[-1][0], when)
        else:
            states.append((state, when))

    def watch(count: int, call: str) -> bool:
        keep(f"power cut before change {count} ({call})")
        return False

    run_and_watch(rig.operate, rig.work, watch)
    keep(_AT_THE_END)
    subprocess.run(["umount", disk], check=True)
    for state, when in states:
        _mount(state, disk)
        rig.look(when, when == _AT_THE_END)
        subprocess.run(["umount", disk], check=True)
    print(f"{rig.driver}: {rig.operation}: died {len(states)} times, {', '.join(when for _, when in states)}")


_IMAGE_BYTES = 48 << 20
_AT_THE_END = "power cut after the last change"


def _mount(image: str, disk: str) -> None:
    # The kernel must not write anything back by itself, nor guess that a rename wants its data written.
    subprocess.run(["mount", "-o", "loop,commit=300,noauto_da_alloc", image, disk], check=True)


def main(driver: str, operation: str, directory: str, how: str = "1") -> None:
    """Try one operation; ``how`` is ``power`` or a stride. Run it in a mount namespace of its own."""
    gc.disable()
    # In memory: who only dies needs no disk.
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1g", "crash-test", directory], check=True)
    if how == "power":
        cut_power(Rig(driver, operation, os.path.join(directory, "disk", "work")), directory)
    else:
        kill(Rig(driver, operation, os.path.join(directory, "work")), directory, int(how))


if __name__ == "__main__":
    main(*sys.argv[1:])
