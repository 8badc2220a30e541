"""A graph driver that keeps every layer as a plain copy of its parent."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path

from unionfs.archive import IdMapping
from unionfs.drivers import CreateOptions, Driver, NaiveDiffDriver, check_layer_id
from unionfs.errors import LayerExistsError, LayerNotFoundError, OptionError


def init(home: str, options: Sequence[str], id_mapping: IdMapping) -> Driver:
    """Open the driver; what differs between two copies is found by ``NaiveDiffDriver``."""
    if options:
        raise OptionError(f"copies: unknown option {options[0]}; it has none, leave it out")
    return NaiveDiffDriver(Copies(Path(home).absolute(), id_mapping.root()), id_mapping)


class Copies:
    """Trees in ``HOME/ID``; whatever is not finished yet, or on its way out, has a dot before its name."""

    name = "copies"

    def __init__(self, home: Path, owner: tuple[int, int]) -> None:
        self._home, self._owner, self._lock = home, owner, threading.Lock()
        home.mkdir(mode=0o711, parents=True, exist_ok=True)
        for left in home.glob(".*"):
            shutil.rmtree(left)

    def create(self, layer_id: str, parent: str = "", options: CreateOptions | None = None) -> None:
        check_layer_id(layer_id, "create")
        for option in {} if options is None else options.storage_options:
            raise OptionError(f"copies: unknown option {option}; it has none, leave it out")
        with self._lock:
            if self.exists(layer_id):
                raise LayerExistsError(f"layer {layer_id} exists already; choose another id")
            new = self._home / f".{layer_id}"
            if parent:
                subprocess.run(["cp", "-a", "--reflink=auto", "--", self.get(parent), new], check=True)
            else:
                new.mkdir()
                new.chmod(0o755)
                os.chown(new, *self._owner)
            new.rename(self._home / layer_id)

    create_read_write = create

    def remove(self, layer_id: str) -> None:
        check_layer_id(layer_id, "remove")
        tree, aside = self._home / layer_id, self._home / f".{layer_id}"
        mounted = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
        for point in reversed([point for point in mounted if point.startswith(f"{tree}/")]):
            subprocess.run(["umount", "--lazy", point], check=True)
        with self._lock:
            if self.exists(layer_id):
                tree.rename(aside)
                shutil.rmtree(aside)

    def get(self, layer_id: str, mount_label: str = "") -> str:
        check_layer_id(layer_id, "get")
        if not self.exists(layer_id):
            raise LayerNotFoundError(f"there is no layer {layer_id} in {self._home}; check the id")
        return str(self._home / layer_id)

    def put(self, layer_id: str) -> None:
        check_layer_id(layer_id, "put")

    def exists(self, layer_id: str) -> bool:
        return layer_id in os.listdir(self._home) and not layer_id.startswith(".")

    def layer_ids(self) -> list[str]:
        return sorted(name for name in os.listdir(self._home) if not name.startswith("."))

    def status(self) -> list[tuple[str, str]]:
        return [("Copies", str(len(self.layer_ids())))]

    def get_metadata(self, layer_id: str) -> dict[str, str]:
        return {"SourceDir": self.get(layer_id)}

    def cleanup(self) -> None:
        pass
