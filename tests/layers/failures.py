"""A driver that fails once, where a test wants it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tests.layers.conftest import Workshop
from unionfs.errors import DriverError


class Failing:
    """A driver that fails in one call, once."""

    def __init__(self, driver: Any, call: str, error: Exception) -> None:
        self._driver = driver
        self._call = call
        self._error: Exception | None = error

    def __getattr__(self, name: str) -> Any:
        if name == self._call and self._error is not None:
            error, self._error = self._error, None

            def fail(*_: object) -> None:
                raise error

            return fail
        return getattr(self._driver, name)

    # These make it one of the kinds of drivers with more to offer.
    def sync(self, layer_id: str) -> None:
        self.__getattr__("sync")(layer_id)

    def layer_ids(self) -> list[str]:
        ids: list[str] = self._driver.layer_ids()
        return ids


@contextmanager
def failing(shop: Workshop, call: str, error: Exception | None = None) -> Iterator[None]:
    real = shop.store.driver
    broken = Failing(real, call, error or DriverError("the test wants this"))
    if call == "sync":
        object.__setattr__(broken, "sync", broken.__getattr__("sync"))
    shop.store.driver = broken
    try:
        yield
    finally:
        shop.store.driver = real
