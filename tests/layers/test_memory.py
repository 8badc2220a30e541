"""Registering and exporting take the same memory whatever the layer's size.

``UNIONFS_TEST_LAYER_MIB=4096`` shows it with a layer of 4 GiB, for which the temporary directory needs 8.1 GiB: the
layer, and the copy of a stream that cannot be rewound.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

LAYER_MIB = int(os.environ.get("UNIONFS_TEST_LAYER_MIB", "300"))

# In a process of its own: what counts is the largest amount it ever had.
PROGRAM = """
import sys
from tests.layers.archives import archive, member
from unionfs.layers import open_store

class Big:
    '''An archive with one file of zeros, made as it is read.'''
    def __init__(self, size):
        header = bytearray(archive([member("big")])[:512])
        header[124:136] = b"%011o\\0" % size
        header[148:156] = b"        "
        header[148:156] = b"%06o\\0 " % sum(header)
        self.left = [bytes(header)], size + 1024
    def read(self, size):
        start, rest = self.left
        if start:
            self.left = [], rest
            return start[0]
        size = min(size, rest)
        self.left = [], rest - size
        return bytes(size)

def peak():
    # Not ru_maxrss: that of the process which started this one counts in it, and a test run can be large.
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("VmHWM:"))

with open_store(sys.argv[1], "vfs") as store:
    small = store.register(Big(1 << 20))
    small.verify()
    before = peak()
    big = store.register(Big(int(sys.argv[2])))
    assert big.diff_size == int(sys.argv[2])
    big.verify()
    print(before, peak())
    big.release()
"""


@pytest.mark.timeout(120 + LAYER_MIB // 4)
def test_memory_does_not_grow_with_the_layer(tmp_path: Path, repository: Path) -> None:
    """Issue 4, point 6: through 200 MB; the spool of what cannot be rewound is on disk."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, tmp_path / "root", str(LAYER_MIB << 20)],
        cwd=repository,
        check=True,
        capture_output=True,
        text=True,
    )
    before, peak = (int(number) for number in done.stdout.split())
    print(f"{LAYER_MIB} MiB took {peak >> 20} MiB of memory, {(peak - before) >> 20} MiB more than 1 MiB took")
    assert peak - before < 30 << 20
    assert peak < 200_000_000
