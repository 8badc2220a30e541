"""What tests of registries pull, push and look with."""

from __future__ import annotations

import os
import random
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.layers.archives import archive, member
from unionfs.engines.images import Image, ImageStore, LayerCompression, Platform, parse_reference
from unionfs.engines.images.registry import Access, RetryPolicy, pull, push, run
from unionfs.layers import collect

UNIONFS = Path(__file__).resolve().parents[3] / ".venv/bin/unionfs"
SKOPEO = ("skopeo", "--insecure-policy")
IMPATIENT = Access(retry=RetryPolicy(attempts=4, first_wait_s=0.01, longest_wait_s=0.05))


def skopeo(*words: str | Path) -> str:
    """Run skopeo without TLS."""
    extra: list[str] = []
    if words[0] == "copy":
        extra = ["-q", "--src-tls-verify=false", "--dest-tls-verify=false"]
    elif words[0] == "inspect":
        extra = ["--tls-verify=false"]
    command = [*SKOPEO, words[0], *extra, *words[1:]]
    return subprocess.run(
        command, check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=120
    ).stdout


def unionfs(root: Path, *words: str, status: int = 0, stdin: str = "", environ: dict[str, str] | None = None) -> str:
    """Run our command; its output, or what it says when it is to fail."""
    done = subprocess.run(
        [UNIONFS, *words, f"--root={root}"],
        check=False,
        capture_output=True,
        text=True,
        input=stdin,
        timeout=120,
        env={**os.environ, **(environ or {})},
    )
    assert done.returncode == status, done.stderr
    return done.stderr if status else done.stdout


def large(seed: int = 1, size: int = 400_000) -> bytes:
    """A layer that cannot be compressed."""
    return archive([member("data", random.Random(seed).randbytes(size))])


def fetch(images: ImageStore, name: str, platform: str = "", **access: Any) -> Image:
    chosen = Platform.parse(platform) if platform else None
    return run(lambda: pull(images, parse_reference(name), platform=chosen, access=replace(IMPATIENT, **access)))


def give(
    images: ImageStore, image: Image, name: str, how: LayerCompression = LayerCompression.GZIP, **access: Any
) -> str:
    reached = replace(IMPATIENT, **access)
    return run(lambda: push(images, image, parse_reference(name), access=reached, compression=how))


def nothing_is_left(images: ImageStore) -> bool:
    files_left = [path for path in Path(images.root).rglob("*") if path.is_file() and path.name != "lock"]
    return images.all() == [] and images.layers.map() == {} and collect(images.layers) == [] and files_left == []
