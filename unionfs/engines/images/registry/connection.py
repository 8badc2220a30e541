"""One connection to a registry: requests, redirects, logins, and what a refusal means."""

from __future__ import annotations

import json
import os
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import TypeVar

import httpx

from unionfs import __version__
from unionfs.engines.images.reference import DEFAULT_REGISTRY
from unionfs.engines.images.registry.authorization import Authorization
from unionfs.engines.images.registry.credentials import Credentials
from unionfs.engines.images.registry.retry import PASSING, Patience, TryAgainError, retry_after
from unionfs.errors import ImageError, RegistryError

Content = Callable[[], AsyncIterator[bytes]]
"""Gives a request's body, from the start each time."""

_Result = TypeVar("_Result")

_TIMEOUT = httpx.Timeout(60.0, connect=30.0, pool=None)
_MAX_REDIRECTS = 5
# Redirects after which a client may not ask with GET instead, which would store nothing (RFC 9110, 15.4).
_SAME_METHOD = (307, 308)
_MAX_ERROR_BYTES = 1 << 16
_MAX_TOKEN_BYTES = 1 << 20
# A smaller blob goes up in one request, a larger one in pieces of this size, each of which can be sent again.
_UPLOAD_BYTES = 32 << 20
# A blob that is compressed on the way can only be got as a whole.
_NO_ENCODING = {"Accept-Encoding": "identity"}
_CERTIFICATE_PLACES = ("/etc/containers/certs.d", "/etc/docker/certs.d")


@dataclass(frozen=True, slots=True)
class Access:
    """How registries are reached.

    Attributes:
        credentials: the user's; None for none.
        plain_http: without TLS; None: only if it is this machine.
        cert_dir: with certificates to trust (``*.crt``) and to show (``*.cert`` with ``*.key``); ``""`` for
            ``/etc/containers/certs.d/HOST`` and ``/etc/docker/certs.d/HOST``.
        patience: with what fails.
        parallel: how many layers are transferred at the same time.
        upload_bytes: how much is sent in one request.
    """

    credentials: Credentials | None = None
    plain_http: bool | None = None
    cert_dir: str = ""
    patience: Patience = field(default_factory=Patience)
    parallel: int = 4
    upload_bytes: int = _UPLOAD_BYTES

    def insecure(self, registry: str) -> bool:
        """Whether the registry is spoken to without TLS."""
        if self.plain_http is not None:
            return self.plain_http
        host = httpx.URL(f"http://{registry}").host
        return host in ("localhost", "::1") or host.startswith("127.")


class BlobMissingError(RegistryError):
    """A part of an image that the registry does not have."""


class Connection:
    """Requests to a registry about one repository; an async context manager.

    Args:
        registry: as in an image's name.
        repository: likewise.
        access: see :class:`Access`.
        actions: ``pull``, or ``pull,push``.
        also_from: other repositories that blobs are taken from.
    """

    def __init__(
        self, registry: str, repository: str, access: Access, actions: str, also_from: Iterable[str] = ()
    ) -> None:
        self.registry = registry
        self.repository = repository
        self.access = access
        insecure = access.insecure(registry)
        # The name that Docker's registry answers to is another than the one in images' names.
        host = "registry-1.docker.io" if registry == DEFAULT_REGISTRY else registry
        self._base = httpx.URL(f"{'http' if insecure else 'https'}://{host}")
        self._http = httpx.AsyncClient(
            verify=_certificates(registry, access.cert_dir),
            timeout=_TIMEOUT,
            headers={"User-Agent": f"unionfs/{__version__}", **_NO_ENCODING},
        )
        scopes = [f"repository:{repository}:{actions}", *(f"repository:{other}:pull" for other in also_from)]
        self._authorization = Authorization(registry, access.credentials, scopes, self._ask, insecure=insecure)

    async def __aenter__(self) -> Connection:
        await self._http.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._http.__aexit__(kind, error, trace)

    def url(self, kind: str, name: str) -> httpx.URL:
        """Of a thing in the repository, such as ``manifests``, ``latest``."""
        return self._base.join(f"/v2/{self.repository}/{kind}/{name}")

    def location(self, response: httpx.Response) -> httpx.URL:
        """Where a response sends us.

        Raises:
            RegistryError: nowhere, or away from TLS.
        """
        location = response.headers.get("Location", "")
        if not location:
            raise RegistryError(f"{self.registry} does not say where to go on")
        url = response.request.url.join(location)
        if url.scheme not in ("https", self._base.scheme):
            raise RegistryError(f"{self.registry} sends us to {str(url)[:200]}, which is not safe")
        return url

    async def keep_trying(
        self, operation: Callable[[], Awaitable[_Result]], progress: Callable[[], int] = lambda: 0
    ) -> _Result:
        """The result of ``operation``; see :meth:`Patience.keep_trying`."""
        return await self.access.patience.keep_trying(self.registry, operation, progress)

    @asynccontextmanager
    async def request(
        self, method: str, url: httpx.URL, headers: Mapping[str, str] | None = None, content: Content | None = None
    ) -> AsyncIterator[httpx.Response]:
        """Send a request; gives the response, whose body is still to be read.

        Raises:
            TryAgainError: the registry has a trouble that may pass.
            RegistryError: it refused the login, or sends us in circles.
            httpx.HTTPError: it cannot be reached.
        """
        response = await self._send(method, url, dict(headers or {}), content)
        try:
            if response.status_code in PASSING:
                reason = f"{_reason(await _start_of(response)) or response.reason_phrase} ({response.status_code})"
                raise TryAgainError(reason, retry_after(response.headers.get("Retry-After")))
            yield response
        finally:
            await response.aclose()

    async def _send(
        self, method: str, url: httpx.URL, headers: dict[str, str], content: Content | None
    ) -> httpx.Response:
        answered = False
        for _ in range(_MAX_REDIRECTS + 2):
            # What lets us into the registry is nobody else's business, such as of the storage that keeps its blobs.
            ours = _origin(url) == _origin(self._base)
            used = self._authorization.header
            authorized = {**headers, "Authorization": used} if ours and used else headers
            body = content() if content is not None else None
            response = await self._http.send(
                self._http.build_request(method, url, headers=authorized, content=body), stream=True
            )
            if response.status_code == 401 and ours and not answered:
                answered = True
                await response.aclose()
                await self._authorization.answer(response.headers.get_list("WWW-Authenticate"), used)
            elif response.is_redirect and (method in ("GET", "HEAD") or response.status_code in _SAME_METHOD):
                await response.aclose()
                url = self.location(response)
            else:
                return response
        raise RegistryError(f"{self.registry} sends us from one place to the next; try again later")

    async def refusal(self, response: httpx.Response, blob: str = "") -> ImageError:
        """What a status that was not expected means for the user.

        Args:
            response: the registry's.
            blob: the digest of what was asked for.
        """
        if blob and response.status_code == 404:
            return BlobMissingError(
                f"{self.registry} has no blob {blob} of {self.repository}; the image is incomplete there, push it again"
            )
        if response.status_code == 401:
            return self._authorization.refused()
        reason = _reason(await _start_of(response)) or response.reason_phrase or "no reason given"
        advice = {
            403: "check that this user may do that",
            404: "check the name",
            413: "it does not take anything that large",
        }.get(response.status_code, "try again later, or ask who runs it")
        if response.is_redirect:
            advice = f"it sends us to {response.headers.get('Location', '')[:200]!r}; use the name it has there"
        what = f"{self.registry} refused {self.repository}"
        return RegistryError(f"{what}: {reason} ({response.status_code}); {advice}")

    async def _ask(self, method: str, url: str, headers: dict[str, str], fields: dict[str, str]) -> tuple[int, bytes]:
        """See :data:`unionfs.engines.images.registry.authorization.Ask`."""
        if method == "GET":
            request = self._http.build_request("GET", httpx.URL(url).copy_merge_params(fields), headers=headers)
        else:
            request = self._http.build_request(method, url, headers=headers, data=fields)
        response = await self._http.send(request, stream=True)
        try:
            if response.status_code in PASSING:
                raise TryAgainError(
                    f"{request.url.host} gave no token ({response.status_code})",
                    retry_after(response.headers.get("Retry-After")),
                )
            return response.status_code, await read_limited(response, _MAX_TOKEN_BYTES)
        finally:
            await response.aclose()


def is_encoded(response: httpx.Response) -> bool:
    """Whether somebody on the way compressed the body, though :data:`_NO_ENCODING` asks not to.

    Then its length and its parts are those of the compressed bytes.
    """
    return response.headers.get("Content-Encoding", "identity").strip().lower() not in ("", "identity")


async def read_limited(response: httpx.Response, limit: int) -> bytes:
    """A body of at most ``limit`` bytes.

    Raises:
        RegistryError: it has more.
    """
    pieces: list[bytes] = []
    total = 0
    async for piece in response.aiter_bytes():
        total += len(piece)
        if total > limit:
            raise RegistryError(f"{response.request.url.host} gave more than {limit} bytes, which is too much for this")
        pieces.append(piece)
    return b"".join(pieces)


async def _start_of(response: httpx.Response) -> bytes:
    try:
        return await read_limited(response, _MAX_ERROR_BYTES)
    except (RegistryError, httpx.HTTPError):
        return b""


def _reason(body: bytes) -> str:
    """The registry's words (distribution specification, "Error Codes"), on one line."""
    try:
        first = json.loads(body)["errors"][0]
        text = str(first.get("message") or first.get("code") or "")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return ""
    return "".join(c if c.isprintable() else " " for c in text)[:200]


def _origin(url: httpx.URL) -> tuple[str, str, int | None]:
    return url.scheme, url.host, url.port or {"http": 80, "https": 443}.get(url.scheme)


def _certificates(registry: str, cert_dir: str) -> ssl.SSLContext:
    """What the system trusts, and what its administrator added for this registry (containers-certs.d(5))."""
    context = ssl.create_default_context()
    for place in [cert_dir] if cert_dir else [os.path.join(place, registry) for place in _CERTIFICATE_PLACES]:
        try:
            names = sorted(os.listdir(place))
        except OSError as error:
            if cert_dir:
                raise RegistryError(f"{cert_dir}: {error.strerror}; give a directory of certificates") from None
            continue
        for name in names:
            path = os.path.join(place, name)
            try:
                if name.endswith(".crt"):
                    context.load_verify_locations(cafile=path)
                elif name.endswith(".cert"):
                    context.load_cert_chain(path, path.removesuffix(".cert") + ".key")
            except (ssl.SSLError, OSError) as error:
                raise RegistryError(
                    f"{path}: cannot be used as a certificate ({error}); replace or remove it"
                ) from None
    return context
