"""A driver that fails once, where a test wants it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tests.layers.conftest import Workshop
from unionfs.errors import DriverError


@contextmanager
def failing(shop: Workshop, call: str, error: Exception | None = None) -> Iterator[None]:
    """The store's driver fails in one call, once."""
    driver = shop.store.driver
    real = getattr(driver, call)
    errors = [error or DriverError("the test wants this")]

    def fail_once(*arguments: object) -> object:
        if errors:
            raise errors.pop()
        return real(*arguments)

    setattr(driver, call, fail_once)
    try:
        yield
    finally:
        delattr(driver, call)
