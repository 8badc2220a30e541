"""Random operations by several processes at once on one mount: no answer out of place, a tree that holds together.

What the result must be cannot be said, so this looks for what must never be: an errno that no file system gives,
names listed that are not there, a dead server, an upper directory in which the kernel sees another tree.
"""

from __future__ import annotations

import errno
import os
import random
import stat
import threading
from collections.abc import Callable

import pytest

from tests.differential import operations as op
from tests.differential.layers import build_lowers
from tests.support.mounts import is_running
from tests.support.sandbox import Sandbox, needs_root
from tests.support.users import in_child

pytestmark = [pytest.mark.differential]

pytest_plugins = ["tests.support.sandbox"]
needs_root()

PROCESSES = 6
OPERATIONS = 1000
# What concurrent programs may meet. Not among them: EIO, ESTALE, ENOSYS, ENOTCONN, EXDEV, EBADF.
ALLOWED = {
    "ENOENT", "EEXIST", "ENOTDIR", "EISDIR", "ENOTEMPTY", "EINVAL", "EPERM", "ENXIO", "ENODATA", "EMLINK", "ELOOP",
    "EBUSY", "ESPIPE", "EAGAIN", "EPIPE",
}  # fmt: skip
FILES = ["d/a", "d/e/c", "d/m", "x", "y", "t/one", "t/two", "home/f", "d/e/f/h", "n/a", "n/b", "back", "big", "sparse"]
DIRS = ["d", "d/e", "d/e/f", "t", "n", "n/d", "home", "only3", "only3/x", "only2"]


def drawn(choice: random.Random) -> op.Op:
    """One random operation; a small set of names, so that the processes meet."""
    file, other = choice.choice(FILES), choice.choice(FILES)
    directory, another = choice.choice(DIRS), choice.choice(DIRS)
    flags = choice.choice([0, 0, 0, 1, 2])
    made: list[Callable[[], op.Op]] = [
        lambda: op.Append(path=file, seed=1, length=choice.choice([1, 5000])),
        lambda: op.Overwrite(path=file, seed=2, length=choice.choice([0, 100, 70_000])),
        lambda: op.Write(path=file, offset=choice.choice([0, 4096]), seed=3, length=100),
        lambda: op.Truncate(path=file, size=choice.choice([0, 10, 10_000])),
        lambda: op.Read(path=file),
        lambda: op.Create(path=file),
        lambda: op.Unlink(path=file),
        lambda: op.Rename(src=file, dst=other, flags=flags),
        lambda: op.Rename(src=directory, dst=another, flags=flags),
        lambda: op.Link(src=file, dst=other),
        lambda: op.Mkdir(path=directory),
        lambda: op.Rmdir(path=directory),
        lambda: op.Symlink(target="d/a", path=file),
        lambda: op.Mknod(path=file, kind=stat.S_IFIFO),
        lambda: op.Chmod(path=choice.choice([file, directory]), mode=choice.choice([0o644, 0o755])),
        lambda: op.Chown(path=choice.choice([file, directory]), owner=1, group=2),
        lambda: op.Utimens(path=file, atime_ns=1, mtime_ns=1),
        lambda: op.SetXattr(path=choice.choice([file, directory]), name="user.x", value=b"v"),
        lambda: op.Stat(path=choice.choice([file, directory])),
        lambda: op.ListDir(path=directory),
        lambda: op.Open(slot=choice.randrange(3), path=file, flags=choice.choice([os.O_RDONLY, os.O_RDWR])),
        lambda: op.OpenWrite(slot=choice.randrange(3), offset=10, seed=4, length=100),
        lambda: op.OpenRead(slot=choice.randrange(3), offset=0, length=100_000),
        lambda: op.OpenStat(slot=choice.randrange(3)),
        lambda: op.Close(slot=choice.randrange(3)),
    ]
    return choice.choice(made)()


def act(root: str, seed: int) -> list[str]:
    """Do many operations; returns those with an answer that must not be."""
    choice = random.Random(seed)
    side = op.Side("ours", root, 0)
    strange: list[str] = []
    for _ in range(OPERATIONS):
        operation = drawn(choice)
        answer = operation.run(side)
        if answer[0] == "error" and answer[1] not in ALLOWED:
            unopened = answer[1] == "EBADF" and isinstance(
                operation, (op.OpenWrite, op.OpenRead, op.OpenStat, op.Close)
            )
            if not unopened:
                strange.append(f"{operation!r}: {answer[1]}")
    side.close_all()
    return strange


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("linked", [False, True], ids=["plain", "linked"])
def test_many_processes_at_once(box: Sandbox, seed: int, linked: bool) -> None:
    box.lowers = [os.path.join(box.root, f"l{n}") for n in (1, 2, 3)]
    build_lowers(box.lowers, linked)
    strange: list[str] = []

    def client(n: int) -> None:
        try:
            strange.extend(in_child(lambda: act(box.target, seed * 100 + n), timeout_s=100))
        except BaseException as error:
            strange.append(repr(error))

    with box.mount("dev") as here:
        threads = [threading.Thread(target=client, args=(n,)) for n in range(PROCESSES)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        assert not strange, "\n".join(strange[:20])
        assert all(is_running(p) for p in here.server_pids)
    if not linked:  # the kernel without an index would take linked names apart
        box.assert_kernel_agrees()
    else:
        box.union_snapshot()


def test_errno_names_are_known() -> None:
    assert set(errno.errorcode.values()) >= ALLOWED
