"""A driver in another process, driven over Docker's graph driver plugin protocol.

Below the driver: the calls over HTTP (httpx, which speaks it over unix sockets and streams bodies both ways by itself),
and how a plugin is found by its name, by sockets and address files in well-known directories.
"""

from __future__ import annotations

import json
import logging
import os
import ssl
import stat
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, BinaryIO, TypeVar
from urllib.parse import urlencode, urlsplit

import httpx

from unionfs.archive.changes import Change, ChangeKind
from unionfs.archive.idmapping import IdMapping
from unionfs.archive.stream import held_stream
from unionfs.archive.tar_reader import Readable
from unionfs.drivers.contract import Capabilities, CreateOptions, check_layer_id, is_layer_id
from unionfs.errors import ArchiveError, DriverError, LayerExistsError, LayerNotFoundError, NotSupportedError
from unionfs.overlay.idmap import IdRange

_log = logging.getLogger(__name__)

_T = TypeVar("_T")

_KINDS = {kind.docker_number: kind for kind in ChangeKind}


def connect(
    name: str,
    home: str,
    options: Sequence[str],
    id_mapping: IdMapping,
    address: PluginAddress | None = None,
) -> PluginDriver:
    """The plugin ``name``, initialised with the home directory ``home``.

    Args:
        name: the plugin's.
        home: the directory it is to keep everything in.
        options: ``key=value`` texts, handed on as they are.
        id_mapping: the owners' mapping.
        address: where it answers; looked up by its name unless given.

    Raises:
        NotSupportedError: there is no such plugin, or it is no graph driver.
        DriverError: it does not answer, or refuses.
    """
    found = address or find_plugin(name)
    if found is None:
        raise missing(name)
    transport = PluginTransport(found)
    try:
        _activate(name, transport)
        transport.call(
            "GraphDriver.Init",
            {
                "Home": home,
                "Opts": list(options) or None,
                "UIDMaps": _ranges(id_mapping.uids),
                "GIDMaps": _ranges(id_mapping.gids),
            },
        )
        return PluginDriver(name, transport, _capabilities(transport))
    except BaseException:
        transport.close()
        raise


class PluginDriver:
    """A :class:`Driver` whose calls a plugin answers; see :func:`connect`.

    What a plugin says when it refuses is only text, so whether a layer is missing or taken is found by asking again.
    """

    def __init__(self, name: str, transport: PluginTransport, capabilities: Capabilities) -> None:
        self._name = name
        self._transport = transport
        self._capabilities = capabilities

    @property
    def name(self) -> str:
        """See :attr:`ProtoDriver.name`."""
        return self._name

    def create(self, layer_id: str, parent: str = "", options: CreateOptions | None = None) -> None:
        """See :meth:`ProtoDriver.create`."""
        self._create("GraphDriver.Create", layer_id, parent, options)

    def create_read_write(self, layer_id: str, parent: str = "", options: CreateOptions | None = None) -> None:
        """See :meth:`ProtoDriver.create_read_write`."""
        self._create("GraphDriver.CreateReadWrite", layer_id, parent, options)

    def remove(self, layer_id: str) -> None:
        """See :meth:`ProtoDriver.remove`."""
        check_layer_id(layer_id, "remove")
        self._transport.call("GraphDriver.Remove", {"ID": layer_id})

    def get(self, layer_id: str, mount_label: str = "") -> str:
        """See :meth:`ProtoDriver.get`."""
        arguments = _without_empty({"ID": layer_id, "MountLabel": mount_label})
        return str(self._ask("get", "GraphDriver.Get", arguments).get("dir") or "")

    def put(self, layer_id: str) -> None:
        """See :meth:`ProtoDriver.put`."""
        check_layer_id(layer_id, "put")
        self._transport.call("GraphDriver.Put", {"ID": layer_id})

    def exists(self, layer_id: str) -> bool:
        """See :meth:`ProtoDriver.exists`; a plugin that does not answer has nothing."""
        if not is_layer_id(layer_id):
            return False
        try:
            return bool(self._transport.call("GraphDriver.Exists", {"ID": layer_id}).get("exists"))
        except DriverError as error:
            _log.warning("%s", error)
            return False

    def status(self) -> list[tuple[str, str]]:
        """See :meth:`ProtoDriver.status`; empty when the plugin does not answer."""
        try:
            pairs = self._transport.call("GraphDriver.Status", {}).get("status") or []
        except DriverError as error:
            _log.warning("%s", error)
            return []
        return [(str(pair[0]), str(pair[1])) for pair in pairs if len(pair) == 2]

    def get_metadata(self, layer_id: str) -> dict[str, str]:
        """See :meth:`ProtoDriver.get_metadata`."""
        facts = self._ask("describe", "GraphDriver.GetMetadata", {"ID": layer_id}).get("metadata") or {}
        return {str(key): str(value) for key, value in facts.items()}

    def cleanup(self) -> None:
        """See :meth:`ProtoDriver.cleanup`; a plugin that does not answer has nothing to clean up for us."""
        try:
            self._transport.call("GraphDriver.Cleanup", {})
        except PluginUnreachableError as error:
            _log.warning("%s", error)

    def capabilities(self) -> Capabilities:
        """See :meth:`CapabilityDriver.capabilities`: what the plugin said when it was initialised."""
        return self._capabilities

    def diff(self, layer_id: str, parent: str = "") -> BinaryIO:
        """See :meth:`DiffDriver.diff`."""
        check_layer_id(layer_id, "diff")
        arguments = _without_empty({"ID": layer_id, "Parent": parent})
        return self._explained(
            "diff", (layer_id, parent), lambda: self._transport.download("GraphDriver.Diff", arguments)
        )

    def changes(self, layer_id: str, parent: str = "") -> list[Change]:
        """See :meth:`DiffDriver.changes`. They carry path and kind; names that are not UTF-8 are not exact in JSON."""
        arguments = _without_empty({"ID": layer_id, "Parent": parent})
        listed = self._ask("list the changes of", "GraphDriver.Changes", arguments).get("changes") or []
        found = []
        for item in listed:
            fields = {key.lower(): value for key, value in item.items()}
            kind = _KINDS.get(fields.get("kind", 0))
            if kind is None:
                raise PluginCallError(f"plugin {self._name}: GraphDriver.Changes: unknown kind in {item}; update it")
            found.append(Change(os.fsencode(str(fields.get("path", ""))), kind))
        return sorted(found, key=lambda change: change.path)

    def apply_diff(self, layer_id: str, parent: str, stream: Readable) -> int:
        """See :meth:`DiffDriver.apply_diff`."""
        check_layer_id(layer_id, "apply a diff to")
        query = {"id": layer_id, "parent": parent}
        reply = self._explained(
            "apply a diff to",
            (layer_id, parent),
            lambda: self._transport.upload("GraphDriver.ApplyDiff", query, stream),
        )
        return int(reply.get("size") or 0)

    def diff_size(self, layer_id: str, parent: str = "") -> int:
        """See :meth:`DiffDriver.diff_size`."""
        arguments = _without_empty({"ID": layer_id, "Parent": parent})
        return int(self._ask("size", "GraphDriver.DiffSize", arguments).get("size") or 0)

    def _create(self, method: str, layer_id: str, parent: str, options: CreateOptions | None) -> None:
        check_layer_id(layer_id, "create")
        given = options or CreateOptions()
        arguments = _without_empty(
            {
                "ID": layer_id,
                "Parent": parent,
                "MountLabel": given.mount_label,
                "StorageOpt": dict(given.storage_options),
            }
        )
        try:
            self._transport.call(method, arguments)
        except PluginCallError as error:
            if parent and not self.exists(parent):
                raise LayerNotFoundError(str(error)) from error
            if self.exists(layer_id):
                raise LayerExistsError(str(error)) from error
            raise

    def _ask(self, doing: str, method: str, arguments: dict[str, Any]) -> dict[str, Any]:
        check_layer_id(str(arguments.get("ID", "")), doing)
        ids = (str(arguments["ID"]), str(arguments.get("Parent", "")))
        return self._explained(doing, ids, lambda: self._transport.call(method, arguments))

    def _explained(self, doing: str, ids: tuple[str, str], call: Callable[[], _T]) -> _T:
        try:
            return call()
        except PluginCallError as error:
            for layer_id in ids:
                if layer_id and not self.exists(layer_id):
                    raise LayerNotFoundError(f"cannot {doing} layer {layer_id}: {error}") from error
            raise


def _activate(name: str, transport: PluginTransport) -> None:
    implements = transport.call("Plugin.Activate").get("implements") or []
    if "GraphDriver" not in implements:
        raise NotSupportedError(
            f"plugin {name} does not implement the requested driver, "
            f"it is for {', '.join(implements) or 'nothing'}; name another"
        )


def _capabilities(transport: PluginTransport) -> Capabilities:
    """Where the protocol's description and its engine differ, both are read: nested and at the top."""
    try:
        reply = transport.call("GraphDriver.Capabilities", {})
    except PluginCallMissingError:
        return Capabilities()
    nested = {key.lower(): value for key, value in (reply.get("capabilities") or {}).items()}
    return Capabilities(reproduces_exact_diffs=bool({**reply, **nested}.get("reproducesexactdiffs")))


def _ranges(ranges: Sequence[IdRange]) -> list[dict[str, int]] | None:
    """A mapping as the engine writes it (its description has other names)."""
    return [{"container_id": r.container, "host_id": r.host, "size": r.count} for r in ranges] or None


def _without_empty(arguments: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in arguments.items() if value}


# Calls

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
        except (ValueError, RecursionError):
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


# Addresses

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
    except (ValueError, AttributeError, KeyError, RecursionError) as error:
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
