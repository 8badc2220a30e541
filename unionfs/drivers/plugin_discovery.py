"""Finding a Docker plugin by its name: sockets and address files in well-known directories."""

from __future__ import annotations

import json
import os
import ssl
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from unionfs.errors import DriverError, NotSupportedError

SOCKET_DIRECTORY = "/run/docker/plugins"
_SCHEMES = ("unix", "tcp", "http", "https")


@dataclass(frozen=True, slots=True, kw_only=True)
class PluginAddress:
    """Where a plugin answers.

    Attributes:
        name: the plugin's.
        socket: path of a unix socket; empty for a network address.
        base_url: the URL that calls are relative to.
        tls: how to check the other side and who we are; None for an unencrypted connection.
    """

    name: str
    socket: str
    base_url: str
    tls: ssl.SSLContext | None = None


def spec_directories() -> tuple[str, ...]:
    """Where address files are, the preferred place first; in a rootless environment the user's own."""
    if "ROOTLESSKIT_STATE_DIR" in os.environ:
        config = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
        return (os.path.join(config, "docker/plugins"), os.path.expanduser("~/.local/lib/docker/plugins"))
    return ("/etc/docker/plugins", "/usr/lib/docker/plugins")


def find_plugin(
    name: str, sockets: str = SOCKET_DIRECTORY, directories: Sequence[str] | None = None
) -> PluginAddress | None:
    """The address of the plugin ``name``, or None when nothing says so.

    Args:
        name: the plugin's.
        sockets: the directory with sockets, which come first.
        directories: those with address files; :func:`spec_directories` unless given.

    Raises:
        DriverError: there is an address file and it cannot be used.
    """
    for path in (f"{sockets}/{name}.sock", f"{sockets}/{name}/{name}.sock"):
        try:
            if stat.S_ISSOCK(os.stat(path).st_mode):
                return _address(name, f"unix://{path}", None, path)
        except OSError:
            continue
    for directory in spec_directories() if directories is None else directories:
        for kind in ("spec", "json"):
            for path in (f"{directory}/{name}.{kind}", f"{directory}/{name}/{name}.{kind}"):
                try:
                    with open(path, encoding="utf-8") as file:
                        text = file.read()
                except (FileNotFoundError, NotADirectoryError):
                    continue
                except (OSError, UnicodeDecodeError) as error:
                    raise DriverError(f"cannot read the plugin's address {path}: {error}; repair it") from error
                return _from_spec(name, text, path) if kind == "spec" else _from_json(name, text, path)
    return None


def list_plugins(sockets: str = SOCKET_DIRECTORY, directories: Sequence[str] | None = None) -> list[str]:
    """The names of all plugins that can be found, sorted."""
    names = set()
    for directory in (sockets, *(spec_directories() if directories is None else directories)):
        try:
            entries = os.listdir(directory)
        except OSError:
            continue
        for entry in entries:
            name = os.path.splitext(entry)[0]
            if find_plugin(name, sockets, directories) is not None:
                names.add(name)
    return sorted(names)


def missing(name: str) -> NotSupportedError:
    """The error for a plugin that nothing says the address of."""
    return NotSupportedError(
        f"driver {name} is not one of ours and no plugin of that name is found; start the plugin, whose socket belongs "
        f"to {SOCKET_DIRECTORY}/{name}.sock, or use unionfs, overlay2 or vfs"
    )


def _from_spec(name: str, text: str, path: str) -> PluginAddress:
    return _address(name, text.strip(), None, path)


def _from_json(name: str, text: str, path: str) -> PluginAddress:
    # The name in the file does not count: the file's own is what was asked for.
    try:
        fields: dict[str, Any] = {key.lower(): value for key, value in json.loads(text).items()}
        address = str(fields["addr"])
        tls = fields.get("tlsconfig") or None
        if tls is not None:
            tls = {key.lower(): value for key, value in tls.items()}
    except (ValueError, AttributeError, KeyError) as error:
        raise DriverError(f"{path}: is no JSON object with the key Addr ({error}); repair it") from error
    return _address(name, address, tls, path)


def _address(name: str, url: str, tls: dict[str, Any] | None, path: str) -> PluginAddress:
    parts = urlsplit(url)
    if parts.scheme not in _SCHEMES:
        raise DriverError(f"{path}: unknown protocol in {url!r}; write one of {', '.join(s + '://' for s in _SCHEMES)}")
    if parts.scheme == "unix":
        # The name in the Host header is moby's for every socket.
        return PluginAddress(name=name, socket=parts.path, base_url="http://plugin.moby.localhost")
    if not parts.netloc:
        raise DriverError(f"{path}: there is no host in {url!r}; write for example tcp://127.0.0.1:8080")
    encrypted = parts.scheme == "https" or tls is not None
    base_url = f"{'https' if encrypted else 'http'}://{parts.netloc}{parts.path.rstrip('/')}"
    return PluginAddress(name=name, socket="", base_url=base_url, tls=_context(tls, path) if encrypted else None)


def _context(tls: dict[str, Any] | None, path: str) -> ssl.SSLContext:
    """As moby: without a CA file, or without a configuration at all, the other side is not checked."""
    settings = tls or {"insecureskipverify": True}
    ca_file = str(settings.get("cafile") or "")
    context = ssl.create_default_context()
    try:
        if ca_file:
            context.load_verify_locations(cafile=ca_file)
        if not ca_file or settings.get("insecureskipverify"):
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        if settings.get("certfile"):
            context.load_cert_chain(str(settings["certfile"]), str(settings.get("keyfile") or "") or None)
    except OSError as error:
        raise DriverError(f"{path}: a certificate cannot be used: {error}; repair the TLSConfig") from error
    return context
