"""A driver in another process, driven over Docker's graph driver plugin protocol."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from typing import Any, BinaryIO, TypeVar

from unionfs.archive.changes import Change, ChangeKind
from unionfs.archive.idmapping import IdMapping
from unionfs.archive.tar_reader import Readable
from unionfs.drivers.contract import Capabilities, CreateOptions
from unionfs.drivers.ids import check_layer_id, is_layer_id
from unionfs.drivers.plugin_discovery import PluginAddress, find_plugin, missing
from unionfs.drivers.plugin_transport import (
    PluginCallError,
    PluginCallMissingError,
    PluginTransport,
    PluginUnreachableError,
)
from unionfs.errors import DriverError, LayerExistsError, LayerNotFoundError, NotSupportedError
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
