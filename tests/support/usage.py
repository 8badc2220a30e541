"""What a mount with a limit shows as used, and what its upper directory takes on the disk."""

from __future__ import annotations

import os
import stat


def used_bytes(target: str) -> int:
    """What df(1) shows as used."""
    st = os.statvfs(target)
    return (st.f_blocks - st.f_bfree) * st.f_frsize


def taken_bytes(*directories: str) -> tuple[int, int]:
    """What directories take with all that is in them, each file once, as du(1) counts.

    And how much of that regular files have beyond their end: attributes, preallocated blocks, and what the file system
    keeps for its own notes on a file, when it likes.
    """
    seen: dict[int, tuple[int, int]] = {}
    for directory in directories:
        for at, names, files in os.walk(directory):
            links = [name for name in names if os.path.islink(f"{at}/{name}")]  # os.walk takes them for directories
            for path in (at, *(f"{at}/{name}" for name in [*files, *links])):
                st = os.lstat(path)
                taken = st.st_blocks * 512
                beyond = max(0, taken - -(-st.st_size // 4096) * 4096) if stat.S_ISREG(st.st_mode) else 0
                seen[st.st_ino] = taken, beyond
    return sum(taken for taken, _ in seen.values()), sum(beyond for _, beyond in seen.values())


def is_counted(target: str, *directories: str) -> bool:
    """Whether a limited mount shows what is on the disk, the file system's own notes aside."""
    taken, beyond = taken_bytes(*directories)
    return taken - beyond <= used_bytes(target) <= taken
