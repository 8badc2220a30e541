"""Mount and process namespaces of our own, in which everything that could be left behind is run.

They last as long as a helper process that waits for the end of its input. The kernel ends that input when we
die in any way, and with the helper go all processes and all mounts made here. So nothing can leak, not even when the
quickstart is killed.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from collections import deque
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import IO

from quickstart_steps.errors import CommandFailedError, QuickstartError

CHROOT_ENVIRONMENT = (
    "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME=/root",
    "LC_ALL=C",
    "TERM=dumb",
    "DEBIAN_FRONTEND=noninteractive",
)
_HELPER = ("unshare", "--mount", "--propagation", "private", "--pid", "--fork", "--kill-child", "--mount-proc")
_KEPT_LINES = 200


class Sandbox:
    """A context in which :meth:`run` runs programs with mounts and process ids of their own."""

    def __init__(self) -> None:
        self._helper: subprocess.Popen[bytes] | None = None
        self._prefix: list[str] = []

    def __enter__(self) -> Sandbox:
        for tool in ("unshare", "nsenter", "chroot", "mount", "umount"):
            if shutil.which(tool) is None:
                raise QuickstartError(f"the program {tool} is missing; run scripts/setup")
        helper = subprocess.Popen(
            [*_HELPER, "cat"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            # ^C is for us: the helper must stay until we have cleaned up.
            start_new_session=True,
        )
        self._helper = helper
        assert helper.stdin is not None
        assert helper.stdout is not None
        assert helper.stderr is not None
        try:
            # What comes back shows that the namespaces are there, since only then the helper runs.
            helper.stdin.write(b"ready\n")
            helper.stdin.flush()
            answer = helper.stdout.readline()
        except BrokenPipeError:
            answer = b""
        if answer != b"ready\n":
            helper.kill()
            reason = helper.stderr.read().decode(errors="replace").strip().replace("\n", "; ")
            self.close()
            if "propagation" in reason:
                advice = "in a chroot, make its directory a mount point first: mount --bind DIR DIR"
            else:
                advice = "in a container, start it with the right to mount (docker: --privileged)"
            raise QuickstartError(f"cannot make namespaces ({reason}); {advice}")
        proc = f"/proc/{helper.pid}"
        # Root and working directory too: entering a mount namespace alone would leave a chroot that we are in.
        self._prefix = ["nsenter", f"--mount={proc}/ns/mnt", f"--pid={proc}/ns/pid_for_children"]
        self._prefix += [f"--root={proc}/root", f"--wd={proc}/cwd", "--"]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End every process in the sandbox; its mounts vanish with the last one."""
        helper, self._helper = self._helper, None
        if helper is None:
            return
        for pipe in (helper.stdin, helper.stdout, helper.stderr):
            if pipe is not None:
                pipe.close()
        try:
            helper.wait(timeout=10)
        except subprocess.TimeoutExpired:
            helper.kill()
            helper.wait()

    def run(
        self,
        argv: Sequence[str],
        *,
        stdin: IO[bytes] | int = subprocess.DEVNULL,
        each_line: Callable[[str], None] | None = None,
        environment: dict[str, str] | None = None,
        name: str | None = None,
    ) -> str:
        """Run a program in the sandbox, and return what it said on standard output and standard error.

        Args:
            argv: the program and its arguments.
            stdin: where its input comes from.
            each_line: called with each line as it is said.
            environment: variables to set for it.
            name: what to call the command in an error, if not by ``argv``.

        Raises:
            CommandFailedError: it could not be run or did not exit with 0.
        """
        process = self.start(argv, stdin=stdin, environment=environment)
        try:
            return finish(process, name or shlex.join(argv), each_line)
        except CommandFailedError:
            raise
        except BaseException:
            # Interrupted: the program must have ended before anybody removes the files that it works on.
            self.close()
            raise

    def start(
        self,
        argv: Sequence[str],
        *,
        stdin: IO[bytes] | int = subprocess.DEVNULL,
        environment: dict[str, str] | None = None,
    ) -> subprocess.Popen[bytes]:
        """Start a program in the sandbox; :func:`finish` waits for it."""
        return subprocess.Popen(
            [*self._prefix, *argv],
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=None if environment is None else os.environ | environment,
        )

    def run_in(
        self,
        root: str,
        script: str,
        *,
        stdin: IO[bytes] | int = subprocess.DEVNULL,
        each_line: Callable[[str], None] | None = None,
    ) -> str:
        """Run a shell script with ``root`` as its root directory, and return what it said.

        Raises:
            CommandFailedError: it did not exit with 0.
        """
        # env of this machine, not the root file system's, which need not have one.
        argv = ["env", "-i", *CHROOT_ENVIRONMENT, "chroot", root, "/bin/sh", "-e", "-c", script]
        return self.run(argv, stdin=stdin, each_line=each_line, name=script)


def finish(process: subprocess.Popen[bytes], name: str, each_line: Callable[[str], None] | None = None) -> str:
    """Wait for a started program, and return the last lines of what it said.

    Raises:
        CommandFailedError: it did not exit with 0.
    """
    assert process.stdout is not None
    kept: deque[str] = deque(maxlen=_KEPT_LINES)
    with process.stdout:
        for raw in process.stdout:
            line = raw.decode(errors="backslashreplace").rstrip()
            kept.append(line)
            if each_line is not None:
                each_line(line)
    status = process.wait()
    output = "\n".join(kept)
    if status != 0:
        last = next((line for line in reversed(kept) if line), "it said nothing")
        raise CommandFailedError(f"'{name}' failed with status {status}: {last}", output)
    return output
