"""What the run changed: the list of changes, and the sizes of the layers."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass

from quickstart_steps.progress import step
from unionfs.archive.changes import changes_of_upper

_KINDS = (("A", "added"), ("C", "changed"), ("D", "deleted"))


@dataclass(frozen=True, slots=True)
class LayerSize:
    """What a layer holds on disk."""

    entries: int
    size_bytes: int


def measure(path: str) -> LayerSize:
    """Count the entries beneath ``path``, and the disk space they use; a file with several names counts once."""
    entries = 0
    size_bytes = 0
    seen: set[tuple[int, int]] = set()
    todo = [path]
    while todo:
        with os.scandir(todo.pop()) as listing:
            for entry in listing:
                entries += 1
                info = entry.stat(follow_symlinks=False)
                if entry.is_dir(follow_symlinks=False):
                    todo.append(entry.path)
                elif info.st_nlink > 1:
                    if (info.st_dev, info.st_ino) in seen:
                        continue
                    seen.add((info.st_dev, info.st_ino))
                size_bytes += info.st_blocks * 512
    return LayerSize(entries, size_bytes)


def human_size(size_bytes: float) -> str:
    """``size_bytes`` as people write it: ``1.5 MiB``."""
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    while size_bytes >= 1024 and len(units) > 1:
        size_bytes /= 1024
        del units[0]
    return f"{size_bytes:.0f} B" if units[0] == "B" else f"{size_bytes:.1f} {units[0]}"


def printable(path: bytes) -> str:
    """``path`` on one line, whatever bytes its names are made of."""
    text = path.decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def print_changes(upper: str, lower: str) -> None:
    """Print what the upper layer adds (A), changes (C) and deletes (D)."""
    with step("Reading the upper layer"):
        changes = list(changes_of_upper(upper, [lower]))
    counts: Counter[str] = Counter()
    print("\nChanges:")
    for change in changes:
        counts[change.kind.value] += 1
        print(f"{change.kind.value} {printable(change.path)}")
    print("\n" + ", ".join(f"{counts[letter]} {word} ({letter})" for letter, word in _KINDS))


def print_sizes(upper: str, lower: str) -> None:
    """Print how large the two layers are."""
    with step("Measuring the layers"):
        sizes = {"lower": (lower, measure(lower)), "upper": (upper, measure(upper))}
    print(f"\n{'layer':<6} {'entries':>8} {'size':>10}  directory")
    for name, (path, size) in sizes.items():
        print(f"{name:<6} {size.entries:>8} {human_size(size.size_bytes):>10}  {path}")
