"""The public suite of the contract (``unionfs.testing``) for each driver, and for our plugin client."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

import pytest

from tests.drivers.rig import Rig, make_rig
from unionfs.testing import DriverContract, DriverRig, LayeredContract

_RESERVED = ("l", "x-removing", "x-creating")


class _Ours(DriverContract):
    kind: ClassVar[str]
    reserved_ids = _RESERVED

    @pytest.fixture
    def rig(self, tmp_path: Path) -> Iterator[Rig]:
        with make_rig(self.kind, os.fspath(tmp_path)) as made:
            yield made


class _OursLayered(_Ours, LayeredContract):
    deep_layers = 127

    @contextmanager
    def filling(self, rig: DriverRig, layer_id: str) -> Iterator[Path]:
        # Mounting each of so many layers is what the shorter test is for.
        yield Path(rig.driver.get_metadata(layer_id)["UpperDir"])


class TestUnionfs(_OursLayered):
    kind = "unionfs"


class TestOverlay2(_OursLayered):
    kind = "overlay2"
    renames_directories = False


class TestVfs(_Ours):
    kind = "vfs"


class TestPlugin(_Ours):
    kind = "plugin"
