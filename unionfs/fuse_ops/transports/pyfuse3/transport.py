"""The transport that works everywhere: pyfuse3, with what libfuse prints turned into one line."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pyfuse3

from unionfs.errors import MountError
from unionfs.fuse_ops.options import MountOptions, default_fuse_words
from unionfs.fuse_ops.speedups import pyfuse3_waiting
from unionfs.fuse_ops.speedups.late_sync.settling import Settling
from unionfs.fuse_ops.transports.mounting import explained
from unionfs.fuse_ops.transports.serving import serve_beside
from unionfs.host.mountinfo import SUBTYPE


class Pyfuse3Transport:
    """Serves ``operations`` through pyfuse3; there can be only one in a process. ``settling`` runs beside it."""

    name = "pyfuse3"

    def __init__(self, operations: pyfuse3.Operations, options: MountOptions, settling: Settling | None = None) -> None:
        self._operations = operations
        self._settling = settling
        self._options = options

    def mount(self, target: str) -> None:
        """Mount on ``target``; raises MountError with what libfuse said."""
        options = self._options
        words = {
            *(options.fuse_words or default_fuse_words()),
            f"fsname={_libfuse_value(options.source)}",
            f"subtype={SUBTYPE}",
        }
        if options.debug:
            words.add("debug")
        said: list[str] = []
        try:
            with _captured_stderr(said):
                pyfuse3.init(self._operations, target, words)
        except RuntimeError:
            raise MountError(f"cannot mount on {target}: {explained(' '.join(said))}") from None
        if said:
            print("\n".join(said), file=sys.stderr)

    async def serve(self, accepted: Callable[[], None], gone: Callable[[], None]) -> None:
        """See :meth:`Transport.serve`."""
        initialize = self._operations.init

        def init() -> None:
            initialize()
            accepted()

        self._operations.init = init  # type: ignore[method-assign]
        if "polling" in self._options.speedups:
            pyfuse3_waiting.install()
        if self._settling is None:
            await pyfuse3.main()
            gone()
        else:
            await serve_beside(self._settling.run, lambda _: pyfuse3.main(), gone)

    def close(self) -> None:
        """Close /dev/fuse, leaving the mount to the session."""
        pyfuse3.close(unmount=False)


def _libfuse_value(text: str) -> str:
    """``text`` for libfuse's option parser; pyfuse3 hands on ASCII only, and this name is just for the eye."""
    return re.sub(r"[\\,]", r"\\\g<0>", text.encode("ascii", "replace").decode())


@contextmanager
def _captured_stderr(lines: list[str]) -> Iterator[None]:
    """Collect what libfuse and fusermount3 print: they do so by themselves, and in several lines."""
    sys.stderr.flush()
    saved = os.dup(2)
    with os.fdopen(os.memfd_create("libfuse"), "r+", errors="replace") as file:
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(saved, 2)
            os.close(saved)
            file.seek(0)
            lines += [line.strip() for line in file if line.strip()]
