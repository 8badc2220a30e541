"""The supervisor's program: it loads what a server needs, and nothing that only people need.

Started by ``unionfs serve supervisor``, and by itself when its code has been replaced. Its size is what a copy has to
be made of, so it is not the command for people itself.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

from unionfs.cli.mount_server import serve_in_copy
from unionfs.errors import SupervisorError
from unionfs.fuse_ops.session.supervisor import listening
from unionfs.fuse_ops.session.supervisor.daemon import End, supervise
from unionfs.fuse_ops.session.supervisor.rehearsal import rehearse
from unionfs.host.daemon import open_standard_fds


def command(socket_path: str | None, idle_s: float) -> list[str]:
    """The command line that runs this program.

    Args:
        socket_path: where to listen; None for a socket that is passed (sd_listen_fds(3)).
        idle_s: end after so many seconds without a request; 0 is never.
    """
    # -P: nothing is to be imported from whatever directory we are started in.
    return [sys.executable, "-P", "-m", "unionfs.cli.supervisor_program", socket_path or "-", str(idle_s)]


def main(socket_path: str | None, idle_s: float) -> int:
    """Run the supervisor and return its exit status."""
    open_standard_fds()
    signal.signal(signal.SIGTERM, _end)
    try:
        end = _supervise(socket_path, idle_s)
    except SupervisorError as error:
        print(f"unionfs: {error}".replace("\n", "\\n"), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    if end is End.STALE:
        # The same process with the new code. Whoever asks before it listens again starts a server by himself.
        os.execv(sys.executable, command(socket_path, idle_s))
    return 0


def _supervise(socket_path: str | None, idle_s: float) -> End:
    passed = listening.passed_socket()
    if passed is None and socket_path is None:
        raise SupervisorError("no socket is passed and none is named; see unionfs serve supervisor --help")
    import logging.handlers  # what a server imports only once it needs it

    _ = logging.handlers
    # A signal that ends us may come meanwhile, and the mount that is rehearsed takes it for its own.
    if not rehearse(serve_in_copy):
        raise SupervisorError("cannot rehearse a mount, so no server can be kept ready; mounts work without")
    if passed is not None:
        end = supervise(passed, serve_in_copy, idle_s=idle_s)
        if end is End.STALE:
            listening.pass_on(passed)
        return end
    assert socket_path is not None
    with listening.made_socket(socket_path) as listener:
        return supervise(listener, serve_in_copy, idle_s=idle_s)


def _end(number: int, frame: FrameType | None) -> None:
    sys.exit(0)


if __name__ == "__main__":
    _path, _idle_s = sys.argv[1:]
    sys.exit(main(None if _path == "-" else _path, float(_idle_s)))
