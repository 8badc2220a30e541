"""Answering a registry's challenge: Basic, or a Bearer token from the server that it names.

Source: distribution, "Token Authentication Specification" and "OAuth2 Token Authentication".
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Iterable
from urllib.parse import urlsplit

import trio

from unionfs.engines.images.registry.challenge import Challenge, parse_challenges
from unionfs.engines.images.registry.credentials import Credentials
from unionfs.errors import RegistryError

_CLIENT = "unionfs"

Ask = Callable[[str, str, dict[str, str], dict[str, str]], Awaitable[tuple[int, bytes]]]
"""Sends (method, URL, headers, query or form) to a token server; its status and a body that is not too large."""


class Authorization:
    """What is sent to one registry so that it lets us in.

    Args:
        registry: for messages.
        credentials: the user's; None for none.
        scopes: what is going to be done, such as ``repository:library/alpine:pull``.
        ask: see :data:`Ask`.
        insecure: the registry itself is spoken to without TLS, so its token server may be too.
    """

    def __init__(
        self, registry: str, credentials: Credentials | None, scopes: Iterable[str], ask: Ask, *, insecure: bool
    ) -> None:
        self._registry = registry
        self._credentials = credentials
        self._scopes = list(scopes)
        self._ask = ask
        self._insecure = insecure
        self._lock = trio.Lock()
        self.header = ""
        """The value of ``Authorization``; ``""`` until the registry asked for it."""

    async def answer(self, headers: list[str], used: str) -> None:
        """Find the :attr:`header` for a challenge.

        Args:
            headers: those of the refusal.
            used: what was sent; another task may have found a better one since.

        Raises:
            RegistryError: there is no answer, or it was refused.
        """
        async with self._lock:
            if self.header != used:
                return
            challenges = parse_challenges(headers)
            for challenge in challenges:
                if challenge.scheme == "bearer" and challenge.parameters.get("realm"):
                    self.header = "Bearer " + await self._token(challenge)
                    return
            for challenge in challenges:
                if challenge.scheme == "basic":
                    self.header = self._basic()
                    return
            raise RegistryError(f"{self._registry} asks for a login of a kind that is not known here")

    def _basic(self) -> str:
        if self._credentials is None or not self._credentials.username:
            raise RegistryError(
                f"{self._registry} asks who you are; use --username and --password-stdin, or docker login"
            )
        return self._credentials.basic()

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
        parts = urlsplit(realm)
        if parts.scheme != "https" and not (parts.scheme == "http" and self._insecure):
            raise RegistryError(f"{self._registry} sends us to {realm[:200]} for a token, which is not safe")
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
            raise RegistryError(f"{parts.hostname} gave no token (status {status}); try again later")
        return token


def _covered(scope: str, scopes: list[str]) -> bool:
    what, _, actions = scope.rpartition(":")
    for known in scopes:
        other, _, allowed = known.rpartition(":")
        if what == other and set(actions.split(",")) <= set(allowed.split(",")):
            return True
    return False
