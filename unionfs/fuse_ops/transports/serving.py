"""The tasks of one mount: what serves it, with those that live no longer.

Not compiled: mypyc miscompiles a coroutine that waits in an ``except`` or a ``finally``, as the end of a nursery does.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio


async def serve_beside(
    companion: Callable[[], Awaitable[None]],
    serve: Callable[[trio.Nursery], Awaitable[None]],
    gone: Callable[[], None],
    end: Callable[[], Awaitable[None]] | None = None,
) -> None:
    """Run ``serve``, which may start tasks in the nursery it gets, and ``companion`` until it is over; then ``end``.

    ``gone`` is called at once when it is over, before what has been begun has ended.
    """
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(companion)
            await serve(nursery)
            gone()
            nursery.cancel_scope.cancel()
    finally:
        if end is not None:
            await end()
