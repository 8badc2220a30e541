"""One connection to a registry: requests, redirects, trying again, and what a refusal means."""

from __future__ import annotations

import json
import os
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from types import TracebackType
from typing import TypeVar

import httpx
import tenacity
import trio

from unionfs import __version__
from unionfs.engines.images.reference import DEFAULT_REGISTRY
from unionfs.engines.images.registry.auth import RegistryAuth, origin
from unionfs.engines.images.registry.credentials import Credentials
from unionfs.errors import ImageError, RegistryError

Content = Callable[[], AsyncIterator[bytes]]
"""Gives a request's body, from the start each time."""

_Result = TypeVar("_Result")

_TIMEOUT = httpx.Timeout(60.0, connect=30.0, pool=None)
_MAX_REDIRECTS = 6
_MAX_ERROR_BYTES = 1 << 16
_MAX_TOKEN_BYTES = 1 << 20
# Too many requests, the server's own trouble, and that of those in between.
_PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})
_ENOUGH_PROGRESS_BYTES = 1 << 16
# A smaller blob goes up in one request, a larger one in pieces of this size, each of which can be sent again.
_UPLOAD_BYTES = 32 << 20
# A blob that is compressed on the way can only be got as a whole.
_NO_ENCODING = {"Accept-Encoding": "identity"}
_CERTIFICATE_PLACES = ("/etc/containers/certs.d", "/etc/docker/certs.d")


class BlobMissingError(RegistryError):
    """A part of an image that the registry does not have."""


class TryAgainError(Exception):
    """It failed, and may work later.

    Args:
        reason: for people.
        after_s: the server asked to wait for so many seconds; 0 if it did not.
    """

    def __init__(self, reason: str, after_s: float = 0.0) -> None:
        super().__init__(reason)
        self.after_s = after_s


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often something is tried that fails for a reason that may pass, and how long is waited in between.

    Attributes:
        attempts: that fail one after the other, without progress between them.
        first_wait_s: doubled each time, and made a little random, so that many clients do not come back together.
        longest_wait_s: also when the server asks for more.
    """

    attempts: int = 6
    first_wait_s: float = 0.5
    longest_wait_s: float = 60.0

    async def call(
        self, registry: str, operation: Callable[[], Awaitable[_Result]], progress: Callable[[], int] = lambda: 0
    ) -> _Result:
        """The result of ``operation``, which is called until it has one.

        Args:
            registry: for messages.
            operation: what to do.
            progress: bytes that need not be transferred again; when they grew, the attempts before do not count.

        Raises:
            RegistryError: it failed for good.
        """
        before = progress()

        def count(state: tenacity.RetryCallState) -> None:
            nonlocal before
            if progress() >= before + _ENOUGH_PROGRESS_BYTES:
                before = progress()
                state.attempt_number = 1
            elif isinstance(_error_of(state), httpx.ConnectError):
                state.attempt_number += 1  # who cannot even be reached is often not there at all

        backoff = tenacity.wait_exponential(self.first_wait_s) + tenacity.wait_random(0, self.first_wait_s / 2)

        def wait(state: tenacity.RetryCallState) -> float:
            error = _error_of(state)
            asked_s = error.after_s if isinstance(error, TryAgainError) else 0.0
            return min(max(backoff(state), asked_s), self.longest_wait_s)

        retrying = tenacity.AsyncRetrying(
            sleep=trio.sleep,
            stop=tenacity.stop_after_attempt(self.attempts),
            wait=wait,
            retry=tenacity.retry_if_exception(_may_pass),
            after=count,
            reraise=True,
        )
        try:
            return await retrying(operation)
        except (TryAgainError, httpx.HTTPError, httpx.InvalidURL, httpx.StreamError) as error:
            reason = str(error).replace("\n", " ")[:300] or type(error).__name__
            if _is_certificate(error):
                reason = f"its certificate is not trusted ({reason}); see --cert-dir, or --plain-http"
            elif _may_pass(error):
                reason += " (after several attempts); try again later"
            raise RegistryError(f"{registry}: {reason}") from error


def _error_of(state: tenacity.RetryCallState) -> BaseException | None:
    return state.outcome.exception() if state.outcome is not None else None


def _may_pass(error: BaseException) -> bool:
    return isinstance(error, TryAgainError | httpx.TransportError) and not _is_certificate(error)


def _is_certificate(error: BaseException) -> bool:
    current: BaseException | None = error
    while current is not None:
        if isinstance(current, ssl.SSLCertVerificationError):
            return True
        current = current.__cause__ or current.__context__
    return False


def retry_after(value: str | None) -> float:
    """Seconds that a ``Retry-After`` header asks for (RFC 9110, 10.2.3): a number of them, or a date; 0 for none."""
    if not value:
        return 0.0
    if value.strip().isdecimal():
        return float(value) if len(value) < 10 else 0.0
    try:
        return max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return 0.0


@dataclass(frozen=True, slots=True)
class Access:
    """How registries are reached.

    Attributes:
        credentials: the user's; None for none.
        plain_http: without TLS; None: only if it is this machine.
        cert_dir: with certificates to trust (``*.crt``) and to show (``*.cert`` with ``*.key``); ``""`` for
            ``/etc/containers/certs.d/HOST`` and ``/etc/docker/certs.d/HOST``.
        retry: of what fails.
        parallel: how many layers are transferred at the same time.
        upload_bytes: how much is sent in one request.
    """

    credentials: Credentials | None = None
    plain_http: bool | None = None
    cert_dir: str = ""
    retry: RetryPolicy = field(default_factory=RetryPolicy)
    parallel: int = 4
    upload_bytes: int = _UPLOAD_BYTES

    def insecure(self, registry: str) -> bool:
        """Whether the registry is spoken to without TLS."""
        if self.plain_http is not None:
            return self.plain_http
        host = httpx.URL(f"http://{registry}").host
        return host in ("localhost", "::1") or host.startswith("127.")


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
        # The name that Docker's registry answers to is another than the one in images' names.
        host = "registry-1.docker.io" if registry == DEFAULT_REGISTRY else registry
        self._base = httpx.URL(f"{'http' if access.insecure(registry) else 'https'}://{host}")
        scopes = [f"repository:{repository}:{actions}", *(f"repository:{other}:pull" for other in also_from)]
        self._auth = RegistryAuth(registry, self._base, access.credentials, scopes, self._ask)
        self._http = httpx.AsyncClient(
            auth=self._auth,
            verify=_certificates(registry, access.cert_dir),
            timeout=_TIMEOUT,
            headers={"User-Agent": f"unionfs/{__version__}", **_NO_ENCODING},
            follow_redirects=True,
            max_redirects=_MAX_REDIRECTS,
            event_hooks={"request": [self._check_safe], "response": [_bound]},
        )

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
        """Where a response says to go on.

        Raises:
            RegistryError: nowhere.
        """
        location = response.headers.get("Location", "")
        if not location:
            raise RegistryError(f"{self.registry} does not say where to go on")
        return response.request.url.join(location)

    async def retry(
        self, operation: Callable[[], Awaitable[_Result]], progress: Callable[[], int] = lambda: 0
    ) -> _Result:
        """The result of ``operation``; see :meth:`RetryPolicy.call`."""
        return await self.access.retry.call(self.registry, operation, progress)

    @asynccontextmanager
    async def request(
        self, method: str, url: httpx.URL, headers: Mapping[str, str] | None = None, content: Content | None = None
    ) -> AsyncIterator[httpx.Response]:
        """Send a request; gives the response, whose body is still to be read.

        Raises:
            TryAgainError: the registry has a trouble that may pass.
            RegistryError: it refused the login, or sends us in circles, to an unsafe place, or with another method.
            httpx.HTTPError: it cannot be reached.
        """
        body = _Body(content) if content is not None else None
        request = self._http.build_request(method, url, headers=headers, content=body)
        try:
            response = await self._http.send(request, stream=True)
        except httpx.TooManyRedirects:
            raise RegistryError(f"{self.registry} sends us from one place to the next; try again later") from None
        try:
            if response.request.method != method:
                # After some redirects httpx asks with GET, as browsers do: nothing is stored by that.
                raise await self.refusal(next(one for one in response.history if one.has_redirect_location))
            await _check_passing(response)
            yield response
        finally:
            await response.aclose()

    async def _check_safe(self, request: httpx.Request) -> None:
        """Nothing is sent without TLS unless the registry itself is spoken to so; called for each redirect too."""
        if request.url.scheme not in ("https", self._base.scheme):
            raise RegistryError(f"{self.registry} sends us to {str(request.url)[:200]}, which is not safe")

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
        if response.status_code == 401 and origin(response.request.url) == origin(self._base):
            return self._auth.refused()
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
        """See :data:`unionfs.engines.images.registry.auth.Ask`."""
        if method == "GET":
            request = self._http.build_request("GET", httpx.URL(url).copy_merge_params(fields), headers=headers)
        else:
            request = self._http.build_request(method, url, headers=headers, data=fields)
        # A form has a secret in it, which is for this server.
        response = await self._http.send(request, stream=True, auth=None, follow_redirects=method == "GET")
        try:
            await _check_passing(response, f"{request.url.host} gave no token: ")
            return response.status_code, await read_limited(response, _MAX_TOKEN_BYTES)
        finally:
            await response.aclose()


class _Body:
    """A request's body, which can be sent again: after a redirect, a login, or a failure."""

    def __init__(self, content: Content) -> None:
        self._content = content

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self._content()


class _Start(httpx.AsyncByteStream):
    """The start of a body."""

    def __init__(self, whole: httpx.AsyncByteStream) -> None:
        self._whole = whole

    async def __aiter__(self) -> AsyncIterator[bytes]:
        total = 0
        async for piece in self._whole:
            yield piece
            total += len(piece)
            if total > _MAX_ERROR_BYTES:
                break

    async def aclose(self) -> None:
        await self._whole.aclose()


async def _bound(response: httpx.Response) -> None:
    """httpx reads all of what comes with a redirect or a challenge, however much that is; nobody wants to know it."""
    if response.has_redirect_location or response.status_code == 401:
        assert isinstance(response.stream, httpx.AsyncByteStream)
        response.stream = _Start(response.stream)
        response.headers.pop("Content-Encoding", None)


async def _check_passing(response: httpx.Response, what: str = "") -> None:
    if response.status_code in _PASSING:
        reason = _reason(await _start_of(response)) or response.reason_phrase
        after_s = retry_after(response.headers.get("Retry-After"))
        raise TryAgainError(f"{what}{reason} ({response.status_code})", after_s)


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
