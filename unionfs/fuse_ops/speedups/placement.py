"""Keeps the server on the processor of its client, as long as there is one client and nobody else needs a processor.

A program that waits for an answer leaves its processor idle while a second one works out the answer. Waking the first
one again takes longer than most answers, above all in a virtual machine. When both share a processor neither has to be
woken: the kernel goes from one to the other.

The scheduler would move the program away from a processor that is in use. It does not when only a task of the policy
SCHED_IDLE uses it, so the server becomes one. Such a task gets next to nothing beside others that want to run,
which is why it is one only while nothing else runs on the machine, and looks again all the time. To go back takes a
privilege; a server without it has a second thread serve the client, one that is never anything else.
"""

from __future__ import annotations

import contextlib
import os
import queue
import resource
import threading
from collections.abc import Callable
from typing import Final

from unionfs.host.processes import CAP_SYS_NICE, has_capability


class IdleThread:
    """Stands in for the one thread that uses it; only one of the two runs at a time.

    Entering SCHED_IDLE takes no privilege, leaving it does. A thread that never leaves it needs none.

    Raises OSError where the policy is not allowed, or no thread.
    """

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[Callable[[], bool] | None] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[bool | BaseException] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="unionfs-beside", daemon=True)
        try:
            self._thread.start()
        except RuntimeError as error:
            raise OSError("no further thread can be started") from error
        self.id: int = self._thread.native_id or 0
        try:
            self.run(_become_idle)
        except BaseException:
            self.close()
            raise

    def run(self, call: Callable[[], bool]) -> bool:
        """Have the thread do ``call``, and return or raise what that does."""
        try:
            self._calls.put(call)
            result = self._results.get()
        except BaseException:  # from a signal; but two threads must not run, even now
            self._drain()
            raise
        if isinstance(result, BaseException):
            raise result
        return result

    def close(self) -> None:
        """End the thread."""
        self._calls.put(None)
        self._thread.join()

    def _drain(self) -> None:
        """Wait until the thread has done what it was given, whether or not that was, and take what it answered."""
        mark = InterruptedError()

        def answer() -> bool:
            raise mark

        self._calls.put(answer)
        while self._results.get() is not mark:
            pass

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            result: bool | BaseException
            try:
                result = call()
            except BaseException as error:
                result = error
            self._results.put(result)
            del call, result  # which keep what they know alive


def _become_idle() -> bool:
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    return True


LOOK_EVERY: Final = 8
"""Requests, from one look to the next."""

_NICE_LIMIT: Final = 20  # RLIMIT_NICE that lets a task of nice 0 leave SCHED_IDLE, see sched(7)
_LOOK_AFTER: Final = 32  # requests in a row, until it is looked at where the client is and who else runs
_MISSES: Final = 8  # times that the client was elsewhere, before it is looked for
_PROCESSOR: Final = 36  # field of /proc/PID/stat, counted from the state, which is field 3


class ClientAffinity:
    """Where the thread that serves requests runs; used by that thread alone, or by the one that stands in for it.

    A thread or a process that is started inherits the place: leave it before, or start it by :meth:`outside`.
    """

    def __init__(self, *, usable: bool = True) -> None:
        self.active = False
        self.in_doubt = False
        """Others wanted to run when it was looked at last; if they do at the next request too, this is left."""
        self._usable = usable
        self._asked = False
        self._returns = False  # whether the thread itself goes there, since it may go back
        self._thread: IdleThread | None = None
        self._stands_in = False  # whether it is at it just now
        self._postponed: list[Callable[[], None]] = []
        self._load_fd = -1
        self._client = 0
        self._processor = -1
        self._before: set[int] = set()
        self._misses = 0

    def consider(self, client: int, before: int) -> None:
        """A request came from the thread ``client``, and ``before`` it others that no other program's came between.

        Every now and then this goes to where the client runs, or leaves it if others want to run. Call it while the
        client waits for its answer: at each request while this is in doubt, else at every ``LOOK_EVERY``-th.
        """
        if before == 0:
            self.leave()
        if before == 0 or not self._usable:
            return
        if not self.in_doubt and before % (LOOK_EVERY if self.active else _LOOK_AFTER):
            return
        self._look(client)

    def _look(self, client: int) -> None:
        if not self._asked:
            self._asked = True
            # One that somebody gave another policy than the usual one is left alone.
            self._usable = os.sched_getscheduler(0) == os.SCHED_OTHER
            self._returns = _may_return()
        if not self._usable:
            return
        if not self._machine_is_quiet():
            # A thread of the kernel has work for some microseconds after each access to a disk, for instance.
            if self.in_doubt:
                self.leave()
            else:
                self.in_doubt = True
            return
        self.in_doubt = False
        if self.active and client == self._client and self._misses < _MISSES:
            return
        self._misses = 0
        try:
            processor = _processor_of(client)
        except OSError:  # it has ended
            self.leave()
            return
        self._client = client
        self._go_to(processor)

    def slept(self) -> None:
        """The client did not send anything at once, as one on this processor does: it may be on another one by now."""
        self._misses += 1

    def leave(self) -> None:
        """Run wherever the scheduler likes, as any other task."""
        self.in_doubt = False
        if not self.active:
            return
        self.active = False
        self._processor = -1
        if not self._returns:
            return  # the other thread stops when it sees this
        try:
            os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
        except OSError:  # the privilege was taken away meanwhile
            self._usable = False
        with contextlib.suppress(OSError):  # none of those processors is left to us: then the kernel has seen to it
            os.sched_setaffinity(0, self._before)

    @property
    def in_other_thread(self) -> bool:
        """Whether it is another thread that is beside the client, and waits for something to do: see :meth:`run`."""
        return self.active and not self._returns

    def run(self, serve: Callable[[], bool]) -> bool:
        """Have the other thread do ``serve``, while this one waits for it; returns or raises what that does.

        What was postponed meanwhile is done after it.
        """
        assert self._thread is not None
        self._stands_in = True
        try:
            return self._thread.run(serve)
        finally:
            self._stands_in = False
            postponed, self._postponed = self._postponed, []
            for call in postponed:
                call()

    def postpone(self, call: Callable[[], None]) -> None:
        """Do ``call`` in the thread that is trio's: now if this is it."""
        if self._stands_in:
            self._postponed.append(call)
        else:
            call()

    def outside(self, call: Callable[[], None]) -> None:
        """Leave, and do ``call``, which may start a thread."""
        self.leave()
        self.postpone(call)

    def close(self) -> None:
        """Leave for good."""
        self.leave()
        self._usable = False
        if self._thread is not None:
            self._thread.close()
            self._thread = None
        if self._load_fd >= 0:
            os.close(self._load_fd)
            self._load_fd = -1

    def _go_to(self, processor: int) -> None:
        if processor == self._processor:
            return
        if not self.active:
            self._before = os.sched_getaffinity(0)
        if processor not in self._before:
            self.leave()
            return
        moved = self.active
        self.active = True  # also half-way, so that leaving undoes what was done
        self._processor = processor
        try:
            if not self._returns:
                if self._thread is None:
                    self._thread = IdleThread()
                os.sched_setaffinity(self._thread.id, {processor})
                return
            os.sched_setaffinity(0, {processor})
            if not moved:
                os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        except OSError:  # a filter of system calls, say
            self._usable = False
            self.leave()

    def _machine_is_quiet(self) -> bool:
        try:
            if self._load_fd < 0:
                self._load_fd = os.open("/proc/loadavg", os.O_RDONLY | os.O_CLOEXEC)
            running = int(os.pread(self._load_fd, 100, 0).split()[3].partition(b"/")[0])
        except OSError:  # no /proc, or one that hides this
            return False
        return running <= 1  # this thread is one


def _processor_of(thread: int) -> int:
    with open(f"/proc/{thread}/stat", "rb") as file:
        return int(file.read().rpartition(b")")[2].split()[_PROCESSOR])


def _may_return() -> bool:
    """Whether this process may leave SCHED_IDLE again, for which the kernel wants a privilege."""
    if resource.getrlimit(resource.RLIMIT_NICE)[0] >= _NICE_LIMIT:
        return True
    return has_capability(CAP_SYS_NICE)
