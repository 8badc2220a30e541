"""The user's name and password for a registry, from where ``docker login`` and ``podman login`` put them.

Sources: containers-auth.json(5) for the places, their order and the keys; Docker's ``docker-credential-helpers`` for
the protocol of the helper programs.
"""

from __future__ import annotations

import base64
import binascii
import json
import logging
import os
import re
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from unionfs.engines.images.reference import DEFAULT_REGISTRY, Reference
from unionfs.errors import RegistryError

_log = logging.getLogger(__name__)

_MAX_FILE_BYTES = 1 << 20
_HELPER_TIMEOUT_S = 60
_HELPER_NAME = re.compile(r"[A-Za-z0-9._-]+")
# What docker login calls its own registry, since 2013.
_DOCKER_HUB_KEY = "https://index.docker.io/v1/"
_DOCKER_HUB_HOSTS = ("index.docker.io", "registry-1.docker.io")
_TOKEN_USER = "<token>"  # a helper's word for "the secret is an identity token"


@dataclass(frozen=True, slots=True)
class Credentials:
    """Who the user is.

    Attributes:
        username, password: for Basic authentication.
        identity_token: an OAuth2 refresh token; then the other two are empty.
    """

    username: str = ""
    password: str = ""
    identity_token: str = ""

    def __repr__(self) -> str:
        return f"<Credentials of {self.username!r}>"  # the rest is nothing for a log

    def basic(self) -> str:
        """The value of an ``Authorization`` header."""
        return "Basic " + base64.b64encode(f"{self.username}:{self.password}".encode()).decode("ascii")


def find_credentials(reference: Reference, environ: Mapping[str, str] = os.environ) -> Credentials | None:
    """The credentials for an image's registry; None when there are none, and the registry is asked anonymously.

    Args:
        reference: whose registry, and whose repository where there are credentials for a part of a registry.
        environ: the environment variables.

    Raises:
        RegistryError: ``$REGISTRY_AUTH_FILE`` cannot be read, or a helper program fails.
    """
    for path in _places(environ):
        known = _read(path, required=path == environ.get("REGISTRY_AUTH_FILE"))
        if known is None:
            continue
        for name in _names(reference):
            found = _in_file(known, name, path)
            if found is not None:
                return found
        if isinstance(store := known.get("credsStore"), str) and store:
            found = _in_store(store, reference.registry)
            if found is not None:
                return found
    return None


def _places(environ: Mapping[str, str]) -> Iterator[str]:
    if path := environ.get("REGISTRY_AUTH_FILE"):
        yield path
        return  # Podman and skopeo look nowhere else then either
    home = environ.get("HOME") or os.path.expanduser("~")
    runtime = environ.get("XDG_RUNTIME_DIR") or f"/run/containers/{os.getuid()}"
    yield os.path.join(runtime, "containers/auth.json" if environ.get("XDG_RUNTIME_DIR") else "auth.json")
    yield os.path.join(environ.get("XDG_CONFIG_HOME") or os.path.join(home, ".config"), "containers/auth.json")
    yield os.path.join(environ.get("DOCKER_CONFIG") or os.path.join(home, ".docker"), "config.json")


def _names(reference: Reference) -> Iterator[str]:
    """For which an entry may be, the most particular first."""
    parts = reference.name.split("/")
    for end in range(len(parts), 0, -1):
        yield "/".join(parts[:end])


def _find(entries: object, name: str) -> tuple[str, object]:
    """The key and the value of a name's entry; ``https://HOST/v2/`` is the same as ``HOST``."""
    if isinstance(entries, dict):
        for key, value in sorted(entries.items(), key=lambda item: item[0] != name):
            plain = str(key).removeprefix("https://").removeprefix("http://").rstrip("/")
            plain = plain.removesuffix("/v1").removesuffix("/v2")
            if (DEFAULT_REGISTRY if plain in _DOCKER_HUB_HOSTS else plain) == name:
                return key, value
    return "", None


def _read(path: str, *, required: bool) -> dict[str, Any] | None:
    try:
        with open(path, "rb") as file:
            contents = file.read(_MAX_FILE_BYTES)
        found = dict(json.loads(contents))
    except FileNotFoundError:
        if required:
            raise RegistryError(f"{path}: there is no such file; change REGISTRY_AUTH_FILE") from None
        return None
    except (OSError, ValueError, RecursionError, TypeError) as error:
        if required:
            raise RegistryError(
                f"{path}: cannot be read ({error}); log in again, or change REGISTRY_AUTH_FILE"
            ) from None
        _log.warning("%s: cannot be read, so its credentials are not used: %s", path, error)
        return None
    return found


def _in_store(store: str, registry: str) -> Credentials | None:
    """What a helper has for a registry of which the file says nothing, as after ``docker login`` into the helper only.

    Like Docker we pull without a login where the helper does not work: who copied the file may not have the program.
    """
    try:
        return _ask_helper(store, _DOCKER_HUB_KEY if registry == DEFAULT_REGISTRY else registry)
    except RegistryError as error:
        _log.warning("%s", error)
        return None


def _in_file(known: dict[str, Any], name: str, path: str) -> Credentials | None:
    key, helper = _find(known.get("credHelpers"), name)
    if isinstance(helper, str) and helper:
        return _ask_helper(helper, key)
    key, entry = _find(known.get("auths"), name)
    if not isinstance(entry, dict):
        return None
    if isinstance(store := known.get("credsStore"), str) and store and not entry.get("auth"):
        return _ask_helper(store, key)
    if isinstance(token := entry.get("identitytoken"), str) and token:
        return Credentials(identity_token=token)
    if isinstance(auth := entry.get("auth"), str) and auth:
        try:
            name, colon, password = base64.b64decode(auth).decode().rstrip("\0").partition(":")
        except (binascii.Error, UnicodeDecodeError):
            colon = ""
        if not colon:
            _log.warning("%s: the entry for %s cannot be read; log in again", path, key)
            return None
        return Credentials(name, password)
    if isinstance(entry.get("username"), str) and isinstance(entry.get("password"), str):
        return Credentials(entry["username"], entry["password"])
    return None


def _ask_helper(helper: str, key: str) -> Credentials | None:
    """Ask ``docker-credential-HELPER`` for a registry's entry; None if it has none."""
    if not _HELPER_NAME.fullmatch(helper):
        raise RegistryError(f"{helper[:100]!r} is no name of a credential helper; correct the configuration")
    program = f"docker-credential-{helper}"
    try:
        done = subprocess.run(
            [program, "get"], input=key.encode(), capture_output=True, timeout=_HELPER_TIMEOUT_S, check=False
        )
        if done.returncode:
            # Helpers have no other way to say "I have none".
            _log.debug("%s has nothing for %s", program, key)
            return None
        found = json.loads(done.stdout[:_MAX_FILE_BYTES])
        name, secret = str(found["Username"]), str(found["Secret"])
    except FileNotFoundError:
        raise RegistryError(f"{program} is not installed, but keeps the password for {key}; install it") from None
    except (subprocess.TimeoutExpired, ValueError, RecursionError, KeyError, TypeError) as error:
        raise RegistryError(f"{program} gave no credentials for {key}: {type(error).__name__}; log in again") from None
    return Credentials(identity_token=secret) if name == _TOKEN_USER else Credentials(name, secret)
