"""The layer store: which layers there are, who needs them, and how they come and go.

The semantics of the calls, of handles and of the counts are those of Docker's ``layer`` package; what
is different is said where it is. The parts are base classes, not attributes, so that a call is documented once, in its
part, and yet found on :class:`LayerStore`. :mod:`unionfs.layers.trees` says in which order locks are taken.
"""

from __future__ import annotations

from types import TracebackType

from unionfs.drivers.contract import Driver
from unionfs.host.locks import StoreLock
from unionfs.layers.metadata import MetadataStore
from unionfs.layers.read_write import ReadWriteLayers
from unionfs.layers.registration import Registration


class LayerStore(Registration, ReadWriteLayers):
    """All layers of one driver.

    Args:
        driver: keeps the trees.
        records: keeps what is known about them.
        lock: held as long as the store is open, and released by :meth:`close`; None: the caller sees to that.
        recover: finish what a crash left half done. Only to look at a store as it is, leave it off.

    With records that are only looked at, nothing is recovered, and every change is an error.

    Raises:
        OSError: the metadata cannot be listed. A layer that cannot be read is no error: see :attr:`unreadable`.
    """

    def __init__(
        self,
        driver: Driver,
        records: MetadataStore,
        lock: StoreLock | None = None,
        *,
        recover: bool = True,
    ) -> None:
        super().__init__(driver, records)
        self._lock = lock
        if recover and not records.read_only:
            self.recover()

    def __enter__(self) -> LayerStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let another process open the store. Mounts stay; :meth:`cleanup` ends them. Closing twice is harmless."""
        if self._lock is not None:
            self._lock.release()

    def cleanup(self) -> None:
        """Finish removals that failed, and end all mounts: for the end of the program that runs the containers."""
        self.records.check_writable()
        self.recover()
        self.driver.cleanup()

    @property
    def driver_name(self) -> str:
        """The driver's name."""
        return self.driver.name

    def driver_status(self) -> list[tuple[str, str]]:
        """The driver's facts about itself, in order."""
        return self.driver.status()
