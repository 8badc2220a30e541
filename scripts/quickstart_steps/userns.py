"""Lets an ordinary user be root over a range of ids: the quickstart starts itself again in a user namespace."""

from __future__ import annotations

import getpass
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from typing import NoReturn

from quickstart_steps.errors import QuickstartError

_INSIDE = "UNIONFS_QUICKSTART_IN_NAMESPACE"
_UNSHARE = ("unshare", "--user", "--map-root-user", "--map-auto")


def become_root(argv: Sequence[str]) -> None:
    """Return at once for root; anybody else goes on in a new process image that runs ``argv`` as root of a namespace.

    Raises:
        QuickstartError: this machine does not let the user have one.
    """
    if os.geteuid() == 0:
        return
    user = getpass.getuser()
    if os.environ.get(_INSIDE):
        raise QuickstartError("the user namespace has no root; run: sudo scripts/quickstart")
    if shutil.which("newuidmap") is None:
        raise QuickstartError("the program newuidmap is missing; run: sudo scripts/setup")
    for path in ("/etc/subuid", "/etc/subgid"):
        if not _has_range(path, user):
            raise QuickstartError(
                f"user {user} has no id range in {path}; run: "
                f"sudo usermod --add-subuids 200000-265535 --add-subgids 200000-265535 {user}"
            )
    trial = subprocess.run([*_UNSHARE, "true"], capture_output=True, text=True, check=False)
    if trial.returncode != 0:
        reason = trial.stderr.strip().replace("\n", "; ")
        raise QuickstartError(
            f"this machine does not let user {user} make a user namespace ({reason}); run: sudo scripts/quickstart"
        )
    _start_again(argv)


def _has_range(path: str, user: str) -> bool:
    try:
        with open(path, encoding="utf-8") as file:
            owners = {line.split(":")[0] for line in file}
    except OSError:
        return False
    return user in owners or str(os.getuid()) in owners


def _start_again(argv: Sequence[str]) -> NoReturn:
    sys.stdout.flush()
    os.execvpe("unshare", [*_UNSHARE, *argv], os.environ | {_INSIDE: "1"})
