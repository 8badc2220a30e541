"""Trying again what failed for a reason that may pass: how often, and when."""

from __future__ import annotations

import random
import ssl
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TypeVar

import httpx
import trio

from unionfs.errors import RegistryError

_Result = TypeVar("_Result")

# Too many requests, the server's own trouble, and that of those in between.
PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})

_ENOUGH_PROGRESS_BYTES = 1 << 16


class TryAgainError(Exception):
    """It failed, and may work later.

    Args:
        reason: for people.
        after_s: the server asked for so many seconds of patience; None if it did not say.
    """

    def __init__(self, reason: str, after_s: float | None = None) -> None:
        super().__init__(reason)
        self.after_s = after_s


@dataclass(frozen=True, slots=True)
class Patience:
    """How long to go on.

    Attributes:
        attempts: that fail one after the other, without progress between them.
        first_wait_s: doubled each time, and made a little random, so that many clients do not come back together.
        longest_wait_s: also when the server asks for more.
    """

    attempts: int = 6
    first_wait_s: float = 0.5
    longest_wait_s: float = 60.0

    async def keep_trying(
        self, registry: str, operation: Callable[[], Awaitable[_Result]], progress: Callable[[], int] = lambda: 0
    ) -> _Result:
        """The result of ``operation``, which is called until it has one.

        Args:
            registry: for messages.
            operation: what to do.
            progress: bytes that need not be transferred again; when they grew, the attempts before do not count.

        Raises:
            RegistryError: it failed for good.
        """
        failures = 0
        before = progress()
        while True:
            after_s: float | None = None
            try:
                return await operation()
            except TryAgainError as error:
                reason, after_s, cause = str(error), error.after_s, error.__cause__
            except httpx.TransportError as error:
                if _is_certificate(error):
                    raise RegistryError(
                        f"{registry}: its certificate is not trusted ({_say(error)}); see --cert-dir, or --plain-http"
                    ) from error
                reason, cause = _say(error), error
            except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError) as error:
                raise RegistryError(f"{registry}: {_say(error)}") from error
            # Who cannot even be reached is often not there at all.
            failures += 2 if isinstance(cause, httpx.ConnectError) else 1
            if progress() >= before + _ENOUGH_PROGRESS_BYTES:
                failures, before = 1, progress()
            if failures >= self.attempts:
                raise RegistryError(f"{registry}: {reason} (after several attempts); try again later") from cause
            wait = self.first_wait_s * 2 ** (failures - 1) * random.uniform(0.8, 1.2)
            await trio.sleep(min(max(wait, after_s or 0), self.longest_wait_s))


def retry_after(value: str | None) -> float | None:
    """Seconds that a ``Retry-After`` header asks for (RFC 9110, 10.2.3): a number of them, or a date."""
    if not value:
        return None
    if value.strip().isdecimal():
        return float(value) if len(value) < 10 else None
    try:
        return max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return None


def _is_certificate(error: BaseException) -> bool:
    current: BaseException | None = error
    while current is not None:
        if isinstance(current, ssl.SSLCertVerificationError):
            return True
        current = current.__cause__ or current.__context__
    return False


def _say(error: Exception) -> str:
    return str(error).replace("\n", " ")[:300] or type(error).__name__
