"""Logging in to a registry: its challenge is answered with Basic, or with a Bearer token from the server it names.

Sources: RFC 9110, 11.6.1; distribution, "Token Authentication Specification" and "OAuth2 Token Authentication".
"""

from __future__ import annotations

import json
import re
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from dataclasses import dataclass, field

import httpx
import trio

from unionfs.engines.images.registry.credentials import Credentials
from unionfs.errors import RegistryError

_CLIENT = "unionfs"
_TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_PARAMETER = re.compile(rf'\s*({_TOKEN})\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^\s,]*))\s*(?:,|$)')
_SCHEME = re.compile(rf"\s*({_TOKEN})(?:\s+|$)")

Ask = Callable[[str, str, dict[str, str], dict[str, str]], Awaitable[tuple[int, bytes]]]
"""Sends (method, URL, headers, query or form) to a token server; its status and a body that is not too large."""


@dataclass(frozen=True, slots=True)
class Challenge:
    """What a registry asks for with ``WWW-Authenticate``: one scheme with its parameters.

    Attributes:
        scheme: in lower case.
        parameters: by their names in lower case.
    """

    scheme: str
    parameters: dict[str, str] = field(default_factory=dict)


def parse_challenges(headers: list[str]) -> list[Challenge]:
    """All challenges in the headers; what cannot be understood is left out."""
    found: list[Challenge] = []
    for header in headers:
        at = 0
        while at < len(header):
            parameter = _PARAMETER.match(header, at)
            if parameter and found:
                name, quoted, plain = parameter.groups()
                value = re.sub(r"\\(.)", r"\1", quoted) if quoted is not None else plain
                found[-1].parameters[name.lower()] = value
                at = parameter.end()
                continue
            scheme = _SCHEME.match(header, at)
            if scheme is None:
                break
            found.append(Challenge(scheme[1].lower()))
            at = scheme.end()
    return found


def origin(url: httpx.URL) -> tuple[str, str, int | None]:
    """Who gets what is sent to a URL."""
    return url.scheme, url.host, url.port or {"http": 80, "https": 443}.get(url.scheme)


class RegistryAuth(httpx.Auth):
    """What lets us into one registry. Nobody else gets it, such as the storage that a registry redirects to.

    Args:
        registry: for messages.
        base: where it is.
        credentials: the user's; None for none.
        scopes: what is going to be done, such as ``repository:library/alpine:pull``.
        ask: see :data:`Ask`.
    """

    def __init__(
        self, registry: str, base: httpx.URL, credentials: Credentials | None, scopes: Iterable[str], ask: Ask
    ) -> None:
        self._registry = registry
        self._origin = origin(base)
        self._credentials = credentials
        self._scopes = list(scopes)
        self._ask = ask
        self._lock = trio.Lock()
        self._header = ""

    async def async_auth_flow(self, request: httpx.Request) -> AsyncGenerator[httpx.Request, httpx.Response]:
        """See :class:`httpx.Auth`; raises :class:`RegistryError` when the registry lets us in with nothing we have."""
        if origin(request.url) != self._origin:
            yield request
            return
        used = self._header
        if used:
            request.headers["Authorization"] = used
        response = yield request
        if response.status_code == 401 and origin(response.request.url) == self._origin:
            request.headers["Authorization"] = await self._answer(response.headers.get_list("WWW-Authenticate"), used)
            yield request

    async def _answer(self, headers: list[str], used: str) -> str:
        """The value of ``Authorization`` for a challenge; that of another task, if one has found it since."""
        async with self._lock:
            if self._header != used:
                return self._header
            challenges = parse_challenges(headers)
            for challenge in challenges:
                if challenge.scheme == "bearer" and challenge.parameters.get("realm"):
                    self._header = "Bearer " + await self._token(challenge)
                    return self._header
            if not any(challenge.scheme == "basic" for challenge in challenges):
                raise RegistryError(f"{self._registry} asks for a login of a kind that is not known here")
            if self._credentials is None or not self._credentials.username:
                raise RegistryError(
                    f"{self._registry} asks who you are; use --username and --password-stdin, or docker login"
                )
            self._header = self._credentials.basic()
            return self._header

    def refused(self) -> RegistryError:
        """What the user can do about a refusal."""
        if self._credentials is None:
            return RegistryError(
                f"{self._registry} does not let everybody in; use --username and --password-stdin, or docker login"
            )
        who = f" of {self._credentials.username}" if self._credentials.username else ""
        return RegistryError(
            f"{self._registry} refused the login{who}; check the user's name and password, and what this user may do"
        )

    async def _token(self, challenge: Challenge) -> str:
        realm = challenge.parameters["realm"]
        query = {"service": challenge.parameters.get("service", "")}
        scopes = list(self._scopes)
        # What the registry asks for may go beyond, as for blobs of another repository.
        scopes += [one for one in challenge.parameters.get("scope", "").split() if not _covered(one, scopes)]
        query["scope"] = " ".join(scopes)
        query = {name: value for name, value in query.items() if value}
        if self._credentials is not None and self._credentials.identity_token:
            form = {
                **query,
                "grant_type": "refresh_token",
                "client_id": _CLIENT,
                "refresh_token": self._credentials.identity_token,
            }
            status, body = await self._ask("POST", realm, {}, form)
        else:
            headers = {}
            if self._credentials is not None:
                headers["Authorization"] = self._credentials.basic()
                query["account"] = self._credentials.username
            status, body = await self._ask("GET", realm, headers, query)
        if status in (400, 401, 403):
            raise self.refused()
        try:
            found = json.loads(body) if status == 200 else {}
            token = found.get("token") or found.get("access_token")
        except (ValueError, AttributeError, RecursionError):
            token = None
        # Nothing that could end the header and begin another one.
        if not isinstance(token, str) or not token.isascii() or not token.isprintable() or " " in token:
            raise RegistryError(f"{realm[:200]} gave no token (status {status}); try again later")
        return token


def _covered(scope: str, scopes: list[str]) -> bool:
    what, _, actions = scope.rpartition(":")
    for known in scopes:
        other, _, allowed = known.rpartition(":")
        if what == other and set(actions.split(",")) <= set(allowed.split(",")):
            return True
    return False
