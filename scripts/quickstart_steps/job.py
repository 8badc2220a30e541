"""What the quickstart does in the mounted root file system: what people do in a container."""

from __future__ import annotations

import shlex
from dataclasses import dataclass

from quickstart_steps import deb as debs
from quickstart_steps.errors import CommandFailedError, QuickstartError
from quickstart_steps.progress import step
from quickstart_steps.sandbox import Sandbox

_SHOWN_LINES = 4
# Small, in every Debian, needed by nothing there, and full of files: the deletion shows well.
_FAVOURITE_LEAF = "tzdata"
_LEAF_TRIES = 40
# A directory that lies in the lower layer, and its new name.
_MOVES = (
    ("/usr/share/common-licenses", "/usr/share/moved-licenses"),
    ("/usr/share/doc", "/usr/share/moved-doc"),
    ("/etc/init.d", "/etc/moved-init.d"),
    ("/usr/share", "/usr/moved-share"),
    ("/var/lib", "/var/moved-lib"),
)
# Present in nearly every root file system, in this order of preference.
_EDITABLE = ("/etc/issue", "/etc/profile", "/etc/passwd")


@dataclass(slots=True)
class Job:
    """The steps, run in the root file system mounted at ``root``."""

    sandbox: Sandbox
    root: str

    def run(self, package: str | None, scratch: str) -> None:
        """Do all of it. ``package`` is the .deb file to install, by default one that is built in ``scratch``."""
        # Its database too: some shells have a dpkg built in.
        if self._has("command -v dpkg && test -f /var/lib/dpkg/status"):
            self._install(package or debs.build(scratch))
            self._purge()
        elif package is not None:
            raise QuickstartError(
                f"cannot install {package}: the root file system is not managed by dpkg; leave out --deb"
            )
        else:
            print("This root file system is not managed by dpkg: installing and deleting packages is left out.")
        self._edit()
        self._move()

    def _install(self, deb: str) -> None:
        name = debs.package_name(deb)
        inside = "/tmp/quickstart.deb"
        try:
            with step(f"Installing {name}"), open(deb, "rb") as file:
                self.sandbox.run_in(self.root, f"mkdir -p /tmp; cat > {inside}", stdin=file)
                said = self._do(f"dpkg --install {inside}")
                self._do(f"rm {inside}")
        except OSError as error:
            raise QuickstartError(f"cannot read {deb}: {error.strerror}; check the path after --deb") from error
        show(f"dpkg --install {name}", said)
        if self._has(f"command -v {shlex.quote(name)}"):
            show(name, self._do(shlex.quote(name)))

    def _purge(self) -> None:
        with step("Deleting a package"):
            name = self._leaf_package()
            said = self._do(f"dpkg --purge {name}") if name is not None else ""
        if name is None:
            print("Every package here is needed by another one: deleting a package is left out.")
            return
        show(f"dpkg --purge {name}", said)
        if self._has(f"dpkg-query --status {name}"):
            raise QuickstartError(
                f"dpkg still knows {name} after it was purged: the mounted tree is not what it should be"
            )

    def _leaf_package(self) -> str | None:
        """An installed package that dpkg would delete without a word."""
        listing = self._do(
            "dpkg-query --show --showformat='${Package} ${Essential} ${Protected} ${db:Status-Status}\\n'"
        )
        names = []
        for line in listing.splitlines():
            name, *rest = line.split()
            if "yes" not in rest and "installed" in rest and name != debs.PACKAGE:
                names.append(name)
        names.sort(key=lambda name: (name != _FAVOURITE_LEAF, name))
        for name in names[:_LEAF_TRIES]:
            if self._has(f"dpkg --simulate --purge {name}"):
                return name
        return None

    def _edit(self) -> None:
        commands = ["mkdir -p /etc /root", "echo 'changed through unionfs' >> /etc/motd", "echo new > /root/new-file"]
        edited = next((path for path in _EDITABLE if self._has(f"test -f {path}")), None)
        if edited is not None:
            # In place, as editors do it: a new file that is renamed over the old one.
            commands += [f"sed -i -e '$ a # edited' {edited}", f"tail -n 1 {edited}"]
        with step("Editing files"):
            said = self._do("; ".join(commands))
        for command in commands:
            show(command)
        if edited is not None and said.splitlines()[-1:] != ["# edited"]:
            raise QuickstartError(f"{edited} does not read back as edited: the mounted tree is not what it should be")

    def _move(self) -> None:
        usable = (move for move in _MOVES if self._has(f"test -d {move[0]} && ! test -L {move[0]}"))
        move = next(usable, None)
        if move is None:
            print("No directory to move was found: moving is left out.")
            return
        old, new = move
        with step("Moving a directory"):
            before = self._do(f"cd {old} && ls -AR .")
            self._do(f"mv {old} {new}")
            after = self._do(f"cd {new} && ls -AR .")
        show(f"mv {old} {new}")
        if before != after or self._has(f"test -e {old}"):
            raise QuickstartError(f"{new} does not hold what {old} held: the mounted tree is not what it should be")

    def _do(self, script: str) -> str:
        return self.sandbox.run_in(self.root, script)

    def _has(self, script: str) -> bool:
        try:
            self._do(script)
        except CommandFailedError:
            return False
        return True


def show(command: str, output: str = "") -> None:
    """Show a command that was run in the root file system, and the end of what it said."""
    print(f"    # {command}")
    for line in output.splitlines()[-_SHOWN_LINES:]:
        print(f"    {line}")
