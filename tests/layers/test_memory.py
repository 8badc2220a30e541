"""Registering and exporting take the same memory whatever the layer's size."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

# In a process of its own: what counts is the largest amount it ever had.
PROGRAM = """
import hashlib, resource, sys
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
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10

with open_store(sys.argv[1], "vfs") as store:
    small = store.register(Big(1 << 20))
    small.verify()
    before = peak()
    big = store.register(Big(int(sys.argv[2])))
    assert big.diff_size == int(sys.argv[2])
    big.verify()
    print(peak() - before)
    big.release()
"""


def test_memory_does_not_grow_with_the_layer(tmp_path: Path, repository: Path) -> None:
    """Issue 4, point 6, at a size that is quick; the spool of what cannot be rewound is on disk."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, tmp_path / "root", str(300 << 20)],
        cwd=repository,
        check=True,
        capture_output=True,
        text=True,
    )
    assert int(done.stdout) < 30 << 20
