"""The graph driver plugin protocol as an ASGI application: calls in, JSON and streams out (spec section 3.2)."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import trio
from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from unionfs.engines.docker_plugin.bodies import BodyReader, StreamResponse
from unionfs.engines.docker_plugin.gate import CallGate
from unionfs.engines.docker_plugin.messages import (
    ActivateReply,
    CreateRequest,
    DifferenceRequest,
    ErrorReply,
    GetRequest,
    InitRequest,
    LayerRequest,
    NothingRequest,
    Reply,
    Request,
)
from unionfs.engines.docker_plugin.service import GraphDriverService
from unionfs.errors import UnionfsError

_log = logging.getLogger(__name__)

_T = TypeVar("_T")

_MEDIA_TYPE = "application/vnd.docker.plugins.v1.2+json"
# Calls of an engine that wait at the same time, for a mount, a disk or a slow sender; more of them queue.
_MAX_THREADS = 100


def make_app(service: GraphDriverService, gate: CallGate | None = None) -> Starlette:
    """The application.

    Args:
        service: answers the calls.
        gate: passed by every call; knows how many run.
    """
    calls = _Calls(service, gate or CallGate())

    async def refuse(_: HttpRequest, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return _json(ErrorReply(err=f"{error.detail}: not a call of the graph driver protocol"), error.status_code)

    return Starlette(
        routes=[
            Route("/Plugin.Activate", _activate, methods=["POST"]),
            Route("/GraphDriver.Diff", calls.diff, methods=["POST"]),
            Route("/GraphDriver.ApplyDiff", calls.apply_diff, methods=["POST"]),
            *(
                Route(f"/GraphDriver.{name}", calls.plain(name, kind, answer), methods=["POST"])
                for name, (kind, answer) in _plain_calls(service).items()
            ),
        ],
        exception_handlers={HTTPException: refuse},
    )


def _plain_calls(service: GraphDriverService) -> Mapping[str, tuple[type[Request], Callable[[Any], Reply]]]:
    return {
        "Init": (InitRequest, service.init),
        "Capabilities": (NothingRequest, service.capabilities),
        "Create": (CreateRequest, service.create),
        "CreateReadWrite": (CreateRequest, service.create_read_write),
        "Remove": (LayerRequest, service.remove),
        "Get": (GetRequest, service.get),
        "Put": (LayerRequest, service.put),
        "Exists": (LayerRequest, service.exists),
        "Status": (NothingRequest, service.status),
        "GetMetadata": (LayerRequest, service.get_metadata),
        "Cleanup": (NothingRequest, service.cleanup),
        "Changes": (DifferenceRequest, service.changes),
        "DiffSize": (DifferenceRequest, service.diff_size),
    }


async def _activate(_: HttpRequest) -> Response:
    return _json(ActivateReply())


class _Calls:
    """The endpoints. A driver's work is done in threads, since it waits for disks and mounts."""

    def __init__(self, service: GraphDriverService, gate: CallGate) -> None:
        self._service = service
        self._gate = gate
        self._limiter = trio.CapacityLimiter(_MAX_THREADS)

    def plain(self, name: str, kind: type[Request], answer: Callable[[Any], Reply]) -> Callable[..., Any]:
        """The endpoint of a call with JSON both ways."""

        async def endpoint(http: HttpRequest) -> Response:
            try:
                request = _parsed(kind, await http.body())
            except (ValueError, ValidationError) as error:
                return _refusal(name, error)
            _log.debug("%s %r", name, request)
            async with self._gate.alone() if name == "Init" else self._gate.shared():
                try:
                    return _json(await self._in_thread(lambda: answer(request)))
                except Exception as error:
                    return _failure(name, request, error)

        return endpoint

    async def apply_diff(self, http: HttpRequest) -> Response:
        """The endpoint of ``ApplyDiff``: a tar stream comes in."""
        request = DifferenceRequest.model_validate(dict(http.query_params))
        _log.debug("ApplyDiff %r", request)
        body = BodyReader(http.stream())
        async with self._gate.shared():
            try:
                reply = _json(await self._in_thread(lambda: self._service.apply_diff(request, body)))
            except Exception as error:
                reply = _failure("ApplyDiff", request, error)
        await body.drain()
        return reply

    async def diff(self, http: HttpRequest) -> Response:
        """The endpoint of ``Diff``: a tar stream goes out."""
        try:
            request = _parsed(DifferenceRequest, await http.body())
        except (ValueError, ValidationError) as error:
            return _refusal("Diff", error)
        _log.debug("Diff %r", request)
        return _DiffResponse(self, request)

    async def send_diff(self, request: DifferenceRequest, scope: Scope, receive: Receive, send: Send) -> None:
        """Open the stream and send it; an engine reads an error only instead of a stream."""
        async with self._gate.shared():
            response: Response
            try:
                stream = await self._in_thread(lambda: self._service.diff(request))
            except Exception as error:
                response = _failure("Diff", request, error, status=500)
            else:
                response = StreamResponse(stream, self._in_thread, lambda error: _log_failure("Diff", request, error))
            await response(scope, receive, send)

    async def _in_thread(self, call: Callable[[], _T]) -> _T:
        return await trio.to_thread.run_sync(call, limiter=self._limiter)


class _DiffResponse(Response):
    """Does its work when it is sent, so that the call is a running one until then."""

    def __init__(self, calls: _Calls, request: DifferenceRequest) -> None:
        super().__init__()
        self._calls = calls
        self._request = request

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._calls.send_diff(self._request, scope, receive, send)


def _parsed(kind: type[Request], body: bytes) -> Any:
    """The message in a body, which may be empty: all fields are optional for Go."""
    return kind.model_validate(json.loads(body) if body.strip() else {})


def _json(reply: Reply, status: int = 200) -> Response:
    # Not pydantic's own JSON, which refuses the surrogates in names that are not UTF-8.
    content = json.dumps(reply.model_dump(by_alias=True)) + "\n"
    return Response(content, status, media_type=_MEDIA_TYPE)


def _refusal(name: str, error: Exception) -> Response:
    """A request that cannot be read."""
    faults = [str(error)]
    if isinstance(error, ValidationError):
        faults = [f"{'.'.join(str(part) for part in one['loc'])}: {one['msg']}" for one in error.errors()]
    text = f"GraphDriver.{name}: the request is not what the protocol has: {'; '.join(faults)}"
    _log.warning("%s", text)
    return _json(ErrorReply(err=text), 400)


def _failure(name: str, request: Request, error: Exception, status: int = 200) -> Response:
    """A call that failed; the engine shows the text to whoever asked for it."""
    _log_failure(name, request, error)
    return _json(ErrorReply(err=_text(error)), status)


def _log_failure(name: str, request: Request, error: Exception) -> None:
    about = getattr(request, "id", "")
    debug = _log.isEnabledFor(logging.DEBUG)
    _log.warning("%s%s: %s", name, f" {about}" if about else "", _text(error), exc_info=error if debug else None)


def _text(error: Exception) -> str:
    if isinstance(error, UnionfsError):
        return str(error)
    if isinstance(error, OSError):
        return f"{error.strerror or error}" + (f": {error.filename}" if error.filename else "")
    return f"internal error: {type(error).__name__}: {error}; start the plugin with --debug to see where"
