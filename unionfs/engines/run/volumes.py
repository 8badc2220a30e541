"""Named volumes: directories of the store that outlive the containers which have them.

Where they are is Docker's layout: ``volumes/NAME/_data`` below the store's root.
"""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass

from unionfs.engines.run.options import VOLUME_NAME, check_volume_name
from unionfs.engines.run.rootfs import RootFs
from unionfs.errors import RunError
from unionfs.host.disk import delete, ensure_dir
from unionfs.layers import LayerStore

_DATA = "_data"


@dataclass(frozen=True, slots=True)
class NamedVolume:
    """One of them.

    Attributes:
        path: of its files.
    """

    name: str
    path: str


class Volumes:
    """The named volumes of a store.

    Args:
        root: of the store.
    """

    def __init__(self, root: str) -> None:
        self._directory = os.path.join(root, "volumes")

    def all(self) -> list[NamedVolume]:
        """All of them by name."""
        try:
            names = sorted(os.listdir(self._directory))
        except FileNotFoundError:
            return []
        found = [NamedVolume(name, self._path(name)) for name in names if VOLUME_NAME.match(name)]
        return [one for one in found if os.path.isdir(one.path)]

    def path_of(self, name: str) -> str:
        """Where the files of a volume are, which need not be there."""
        check_volume_name(name)
        return self._path(name)

    def make(self, name: str) -> bool:
        """Make a volume; False if it is there.

        Raises:
            RunError: it cannot be called so.
            OSError: it cannot be made.
        """
        path = self.path_of(name)
        if os.path.isdir(path):
            return False
        ensure_dir(os.path.dirname(path), 0o711)
        ensure_dir(path, 0o755)
        return True

    def remove(self, name: str, user: str) -> None:
        """Remove a volume with its files.

        Args:
            user: a container that has it; empty for none.

        Raises:
            RunError: there is none, or containers have it.
        """
        if not os.path.isdir(self.path_of(name)):
            raise RunError(f"there is no volume {name}; unionfs volume ls shows those that are there")
        if user:
            raise RunError(f"volume {name} is used by container {user}; remove that first: unionfs container rm {user}")
        delete(os.path.join(self._directory, name))

    def _path(self, name: str) -> str:
        return os.path.join(self._directory, name, _DATA)


def root_of(store: LayerStore) -> str:
    """The root of a layer store: its records are in ``image/DRIVER/layerdb``."""
    records: str = store.records.root  # type: ignore[attr-defined]  # only a store in files can say where it is
    return os.path.dirname(os.path.dirname(os.path.dirname(records)))


def fill(path: str, rootfs: RootFs, destination: str) -> None:
    """Copy what an image has at a volume's destination into the new volume, as Docker does, owners and modes included.

    Args:
        path: of the volume's files.
        rootfs: the container's files.
        destination: where the volume is going to be.

    Raises:
        RunError: it cannot be copied.
    """
    if (opened := rootfs.open_dir(destination)) is None:
        return
    try:
        copied = subprocess.run(
            ["cp", "-a", "--", f"/proc/self/fd/{opened}/.", path],
            pass_fds=(opened,),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
    finally:
        os.close(opened)
    if copied.returncode != 0:
        said = copied.stderr.strip().replace("\n", "; ")
        raise RunError(f"volume for {destination}: what the image has there cannot be copied ({said}); free space")
