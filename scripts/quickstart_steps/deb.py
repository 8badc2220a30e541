"""Builds the small Debian package that the quickstart installs."""

from __future__ import annotations

import os
import shutil
import subprocess

from quickstart_steps.errors import QuickstartError

PACKAGE = "unionfs-hello"
VERSION = "1.0"

# What real packages are made of: a program, a configuration file, documentation, and scripts that dpkg runs.
_FILES: dict[str, tuple[int, str]] = {
    "DEBIAN/control": (
        0o644,
        f"Package: {PACKAGE}\nVersion: {VERSION}\nArchitecture: all\nSection: misc\nPriority: optional\n"
        "Maintainer: unionfs <unionfs@localhost>\n"
        "Description: says hello from inside a union mount\n A package to try a writable layer with.\n",
    ),
    "DEBIAN/conffiles": (0o644, f"/etc/{PACKAGE}.conf\n"),
    "DEBIAN/postinst": (
        0o755,
        '#!/bin/sh\nset -e\nif [ "$1" = configure ]; then\n'
        f"    mkdir -p /var/lib/{PACKAGE}\n    echo installed > /var/lib/{PACKAGE}/state\nfi\n",
    ),
    "DEBIAN/postrm": (0o755, f'#!/bin/sh\nset -e\n[ "$1" != purge ] || rm -rf /var/lib/{PACKAGE}\n'),
    f"etc/{PACKAGE}.conf": (0o644, "greeting=Hello\n"),
    f"usr/bin/{PACKAGE}": (
        0o755,
        f'#!/bin/sh\n. /etc/{PACKAGE}.conf\necho "$greeting from a program installed in the upper layer"\n',
    ),
    f"usr/share/doc/{PACKAGE}/copyright": (0o644, "Made by scripts/quickstart of unionfs.\n"),
}


def build(directory: str) -> str:
    """Build the package in ``directory`` and return the path of the .deb file."""
    if shutil.which("dpkg-deb") is None:
        raise QuickstartError("the program dpkg-deb is missing; install the package dpkg, or name a package with --deb")
    tree = os.path.join(directory, PACKAGE)
    for name, (mode, text) in _FILES.items():
        path = os.path.join(tree, name)
        os.makedirs(os.path.dirname(path), mode=0o755, exist_ok=True)
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(path, mode)
    deb = os.path.join(directory, f"{PACKAGE}_{VERSION}_all.deb")
    # The owners inside are root whoever builds it.
    done = subprocess.run(
        ["dpkg-deb", "--root-owner-group", "--build", tree, deb],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"LC_ALL": "C"},
    )
    if done.returncode != 0:
        raise QuickstartError(f"dpkg-deb could not build {deb}: {done.stderr.strip()}; name a package with --deb")
    return deb


def package_name(deb: str) -> str:
    """The name of the package in the file ``deb``."""
    done = subprocess.run(["dpkg-deb", "--field", deb, "Package"], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = done.stderr.strip().splitlines()
        raise QuickstartError(
            f"{deb} is not a Debian package ({reason[-1] if reason else 'dpkg-deb refuses it'}); "
            "give a .deb file after --deb"
        )
    return done.stdout.strip()
