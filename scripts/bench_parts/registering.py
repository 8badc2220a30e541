"""Taking in an image: the time until the command returns and until everything is on the disk, and the CPU time."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass

from bench_parts.image import Image
from bench_parts.registrars import Registrar
from bench_parts.rig import Rig
from bench_parts.samples import Group, Row, Sample

REGISTER = Row("register", "until the command returns", group=Group.IMAGES)
REGISTER_SYNCED = Row("register-synced", "until it is on the disk", group=Group.IMAGES)
REGISTER_CPU = Row("register-cpu", "CPU time", group=Group.IMAGES)
ROWS = (REGISTER, REGISTER_SYNCED, REGISTER_CPU)


@dataclass(frozen=True, slots=True)
class Registering:
    """Each program takes the same image in, into an empty directory. The image itself has been read before.

    Ours syncs what it stores before the command returns; the others leave that to the kernel. So everything is synced
    after each of them too, and the time with that is a row of its own.
    """

    image: Image
    rows: tuple[Row, ...] = ROWS
    once: bool = False

    def measure(self, rig: Rig, peer: Registrar) -> Mapping[str, Sample]:
        _read(self.image)
        with rig.empty_directory() as directory, peer.ready(self.image, directory) as register:
            rig.settle()
            effort = register()
            started = time.perf_counter_ns()
            rig.settle()
            synced = effort.wall_ms + (time.perf_counter_ns() - started) / 1e6
        return {
            REGISTER.name: Sample(effort.wall_ms),
            REGISTER_SYNCED.name: Sample(synced),
            REGISTER_CPU.name: Sample(effort.cpu_ms),
        }


def _read(image: Image) -> None:
    """Have the image in the kernel's cache."""
    for path in (image.archive, *image.layers):
        with open(path, "rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
            while file.read(1 << 20):
                pass
