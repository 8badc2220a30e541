"""The files of a container's /etc that belong to the machine it runs on: hosts, hostname, resolv.conf."""

from __future__ import annotations

import os
from typing import Literal

NAMES = ("hosts", "hostname", "resolv.conf")
"""They are mounted over those in the container's ``/etc``."""

_LOCALHOST = "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n"


def write_host_files(directory: str, hostname: str, network: Literal["host", "none"]) -> None:
    """Write the files of :data:`NAMES`.

    Args:
        directory: where to.
        hostname: the container's.
        network: with the host's, its names and name servers count in the container too.

    Raises:
        OSError: they cannot be written.
    """
    shared = network == "host"
    hosts = (_host_file("/etc/hosts") if shared else b"") or _LOCALHOST.encode()
    if not hosts.endswith(b"\n"):
        hosts += b"\n"
    _write(directory, "hosts", hosts + f"127.0.1.1\t{hostname}\n".encode())
    _write(directory, "hostname", f"{hostname}\n".encode())
    _write(directory, "resolv.conf", _host_file("/etc/resolv.conf") if shared else b"")


def _host_file(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError:
        return b""


def _write(directory: str, name: str, contents: bytes) -> None:
    with open(os.path.join(directory, name), "wb") as file:
        os.fchmod(file.fileno(), 0o644)
        file.write(contents)
