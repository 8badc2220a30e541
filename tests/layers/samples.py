"""Three layers that tests of the layer store register: a base, what changes it, and another."""

from __future__ import annotations

import io

from tests.layers.archives import archive, member

BASE = archive([member("etc/"), member("etc/conf", "base"), member("gone", "1")])
TOP = archive([member("etc/"), member("etc/conf", "top"), member(".wh.gone")])
OTHER = archive([member("other", "layer")])


def stream(tar: bytes) -> io.BytesIO:
    return io.BytesIO(tar)
