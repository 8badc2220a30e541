"""``unionfs-mount``: the mount program that container engines, mount(8) and /etc/fstab run.

Engines start it for every mount. So it first asks the supervisor, for which it needs to import next to nothing, and
only starts a server by itself when there is none (mount_server). What an import costs is said in supervisor.client.
"""

import posix
import sys

from unionfs.fuse_ops.session.supervisor import client

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence


def main(arguments: "Sequence[str] | None" = None) -> int:
    """Run the program and return its exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        # With a standard stream closed, Python has None for it, and the number would be given to the next file.
        if None not in (sys.stdin, sys.stdout, sys.stderr):
            argv = sys.orig_argv if arguments is None else [*sys.orig_argv[:1], *given]
            status = client.mount(given, argv, posix.environ)
            if status is not None and arguments is None:
                # Nothing is left to do, and taking Python down takes as long as the supervisor's part.
                posix._exit(status)
            if status is not None:
                return status
    except KeyboardInterrupt:
        return 130
    import resource

    if resource.getrlimit(resource.RLIMIT_FSIZE)[0] != resource.RLIM_INFINITY:
        sys.dont_write_bytecode = True  # Python would cache the half of a module, and read that ever after
    from unionfs.fuse_ops.session import mount_server

    return mount_server.main(given)


if __name__ == "__main__":
    sys.exit(main())
