"""``python -m tests.layers.hammer ROOT DRIVER``: 16 threads use one store for everything at once.

As a program it is one of several that want the same store. It says ``ready`` and waits for a line; then it tries to
open the store until it gets it, and says ``refused`` with the reason the first time that it does not. Once it has the
store, it says ``open``, waits for another line, hammers, and says ``done``.
"""

from __future__ import annotations

import io
import sys
import threading
import time
from pathlib import Path

from tests.layers.archives import archive, member
from unionfs.errors import LayerDoesNotExistError, MountNameConflictError, StoreLockedError
from unionfs.layers import LayerStore, open_store

THREADS = 16
BASE = archive([member("etc/"), member("etc/conf", "base")])
_TARS = [archive([member("shared", "x"), member(f"layer{number}", "y" * number)]) for number in range(4)]
_PATIENCE_S = 240.0


def hammer(store: LayerStore, turns: int = 3) -> None:
    """Register, get, release, create, mount and remove from all threads; at the end there is nothing again.

    Raises:
        ExceptionGroup: what went wrong in the threads.
        AssertionError: a count is wrong at the end.
    """
    base = store.register(io.BytesIO(BASE))
    failures: list[Exception] = []
    mounting = threading.Semaphore(2)  # a file system server each; there are only so many cores
    together = threading.Barrier(THREADS)

    def work(number: int) -> None:
        try:
            together.wait()
            for turn in range(turns):
                _one_turn(store, base.chain_id, number, turn, mounting)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise ExceptionGroup("in the threads", failures)
    assert store.map().keys() == {base.chain_id}
    assert store.reference_count(base.chain_id) == 1
    assert store.rw_layers() == {}
    assert {base.cache_id} == store.driver_ids()
    assert store.incomplete() == []
    assert [gone.chain_id for gone in base.release()] == [base.chain_id]
    assert store.map() == {}


def _one_turn(store: LayerStore, base: str, number: int, turn: int, mounting: threading.Semaphore) -> None:
    layer = store.register(io.BytesIO(_TARS[(number + turn) % len(_TARS)]), base)
    again = store.get(layer.chain_id)
    rw = store.create_rw_layer(f"c{number}-{turn}", layer.chain_id)
    try:
        # Pairs of threads want one name; the layer may go from under who comes late.
        contested = store.create_rw_layer(f"contested-{number // 2}", base)
    except MountNameConflictError:
        contested = None
    layer.release()
    if turn == 0 and number % 4 == 0:
        with mounting, rw.mounted() as path:
            assert Path(path, "shared").read_text() == "x"
            Path(path, "written").write_text("y")
        assert [change.path for change in rw.changes()] == [b"/written"]
    second = store.get_rw_layer(rw.name)
    assert rw.release() == []
    assert second.name in store.rw_layers()
    second.release()
    if contested is not None:
        contested.release()
    again.release()
    try:
        store.get(layer.chain_id).release()
    except LayerDoesNotExistError:
        pass  # this thread was the last one to need it


def main(root: str, driver: str) -> None:
    """See the module's description."""
    print("ready", flush=True)
    sys.stdin.readline()
    end = time.monotonic() + _PATIENCE_S
    refused = False
    while True:
        try:
            store = open_store(root, driver)
            break
        except StoreLockedError as error:
            if time.monotonic() > end:
                raise
            if not refused:
                print("refused", error, flush=True)
            refused = True
            time.sleep(0.02)
    print("open", flush=True)
    sys.stdin.readline()
    with store:
        hammer(store)
        store.cleanup()
    print("done", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
