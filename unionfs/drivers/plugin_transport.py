"""Calls to a Docker plugin over HTTP: how they are written, repeated and refused.

httpx is used because it speaks HTTP over unix sockets and streams bodies both ways without anything beside it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any, BinaryIO
from urllib.parse import urlencode

import httpx

from unionfs.archive.tar_reader import Readable
from unionfs.drivers.plugin_discovery import PluginAddress
from unionfs.drivers.streams import held_stream
from unionfs.errors import ArchiveError, DriverError

_ACCEPT = "application/vnd.docker.plugins.v1.2+json"
_MAX_DELAY_S = 30
_PIECE_BYTES = 1 << 16
_CONNECT_S = 10.0


class PluginCallError(DriverError):
    """The plugin answered with an error."""


class PluginCallMissingError(PluginCallError):
    """The plugin does not know the call."""


class PluginUnreachableError(DriverError):
    """There was no answer, or it broke off."""


def delay_s(attempt: int) -> int:
    """How long to wait after attempt number ``attempt``, from 0, failed to connect: 1, 2, 4, 8, 16, 30, 30..."""
    return min(1 << min(attempt, 10), _MAX_DELAY_S)


def gives_up(elapsed_s: float, next_delay_s: float, limit_s: float = _MAX_DELAY_S) -> bool:
    """Whether no further attempt is made, ``elapsed_s`` after the first one."""
    return elapsed_s + next_delay_s >= limit_s


class PluginTransport:
    """Calls to one plugin. May be used by many threads.

    Args:
        address: where it answers.
        patience_s: how long to try to connect.
        sleep: waits between attempts.
    """

    def __init__(
        self, address: PluginAddress, *, patience_s: float = _MAX_DELAY_S, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self._name = address.name
        self._patience_s = patience_s
        self._sleep = sleep
        self._client = httpx.Client(
            base_url=address.base_url,
            transport=httpx.HTTPTransport(
                uds=address.socket or None,
                verify=address.tls if address.tls is not None else False,
                # No connection is kept: one that the plugin has closed would fail a call that may not be repeated.
                limits=httpx.Limits(max_keepalive_connections=0, max_connections=None),
            ),
            headers={"Accept": _ACCEPT, "Accept-Encoding": "identity"},
            # The plugin may take its time: there is no limit for large layers.
            timeout=httpx.Timeout(None, connect=_CONNECT_S),
            trust_env=False,
        )

    def call(self, method: str, arguments: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Call ``method`` (``GraphDriver.Get``) and return the reply's fields. No arguments at all: an empty body.

        Raises:
            PluginCallError: the plugin says so; :class:`PluginCallMissingError` when it does not know the call.
            PluginUnreachableError: there was no answer.
        """
        body = b"" if arguments is None else json.dumps(arguments).encode() + b"\n"
        response = self._send(method, f"/{method}", lambda: body, stream=False)
        return self._fields(method, response)

    def upload(self, method: str, query: Mapping[str, str], stream: Readable) -> dict[str, Any]:
        """Call ``method`` with the contents of ``stream`` as the body; see :meth:`call`."""
        response = self._send(method, f"/{method}?{urlencode(query)}", lambda: _pieces(stream), stream=False)
        return self._fields(method, response)

    def download(self, method: str, arguments: Mapping[str, Any]) -> BinaryIO:
        """Call ``method`` and return the body of the reply, to be closed by the caller.

        Reading raises :class:`ArchiveError` when the connection breaks off.
        """
        body = json.dumps(arguments).encode() + b"\n"
        with ExitStack() as held:
            response = self._send(method, f"/{method}", lambda: body, stream=True)
            held.callback(response.close)
            if response.status_code != httpx.codes.OK:
                self._read(method, response)
                self._fields(method, response)
            return held_stream(self._body(method, response), held)

    def close(self) -> None:
        """Close all connections."""
        self._client.close()

    def _send(
        self, method: str, path: str, content: Callable[[], bytes | Iterator[bytes]], *, stream: bool
    ) -> httpx.Response:
        started = time.monotonic()
        attempt = 0
        while True:
            request = self._client.build_request("POST", path, content=content())
            try:
                return self._client.send(request, stream=stream)
            except (httpx.ConnectError, httpx.ConnectTimeout) as error:
                # Nothing was sent, so any call may be made again.
                delay = delay_s(attempt)
                if gives_up(time.monotonic() - started, delay, self._patience_s):
                    raise self._unreachable(method, error) from error
                self._sleep(delay)
                attempt += 1
            except httpx.TransportError as error:
                raise self._unreachable(method, error) from error

    def _fields(self, method: str, response: httpx.Response) -> dict[str, Any]:
        """The reply with the keys in lower case, since Go does not tell them apart by case."""
        try:
            reply = json.loads(response.content) if response.content.strip() else {}
        except ValueError:
            reply = None
        fields = {key.lower(): value for key, value in reply.items()} if isinstance(reply, dict) else None
        if response.status_code != httpx.codes.OK:
            # HTTP allows a status without words.
            words = response.reason_phrase or httpx.codes.get_reason_phrase(response.status_code)
            text = str((fields or {}).get("err") or response.text.strip() or words)
            kind = PluginCallMissingError if response.status_code == httpx.codes.NOT_FOUND else PluginCallError
            raise kind(f"plugin {self._name}: {method}: {text}")
        if fields is None:
            raise PluginCallError(f"plugin {self._name}: {method}: the reply is no JSON object; update the plugin")
        if fields.get("err"):
            raise PluginCallError(f"plugin {self._name}: {method}: {fields['err']}")
        return fields

    def _read(self, method: str, response: httpx.Response) -> None:
        try:
            response.read()
        except httpx.TransportError as error:
            raise self._unreachable(method, error) from error

    def _body(self, method: str, response: httpx.Response) -> Iterator[bytes]:
        try:
            yield from response.iter_raw()
        except httpx.TransportError as error:
            raise ArchiveError(
                f"plugin {self._name}: {method}: the stream broke off ({error}); see the plugin's log and try again"
            ) from error

    def _unreachable(self, method: str, error: httpx.TransportError) -> PluginUnreachableError:
        return PluginUnreachableError(
            f"plugin {self._name}: {method}: no answer ({error}); check that the plugin is running"
        )


def _pieces(stream: Readable) -> Iterator[bytes]:
    while piece := stream.read(_PIECE_BYTES):
        yield piece
