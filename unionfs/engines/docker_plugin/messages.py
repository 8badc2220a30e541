"""The JSON of the graph driver plugin protocol: what the engine asks and what it is told.

The engine is written in Go: it leaves out what is empty or writes ``null``, and tells keys apart without regard to
case. Requests are read in the same way. Replies have the keys that its structures have.
"""

from __future__ import annotations

import json
from typing import Any, Self

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.alias_generators import to_pascal

from unionfs.archive.idmapping import IdMapping
from unionfs.drivers.contract import CreateOptions
from unionfs.overlay.idmap import IdRange

_FAULTS = 3  # of a request, that are told


class Request(BaseModel):
    """What the engine sends. Aliases are in lower case, since that is what the keys are turned into."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    @model_validator(mode="before")
    @classmethod
    def _as_go_reads(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            return fields
        return {str(key).lower(): value for key, value in fields.items() if value is not None}

    @classmethod
    def decode(cls, body: bytes) -> Self:
        """The request in a body, which may be empty: all fields are optional for Go.

        Raises:
            ValueError: it is not such a request; the text is one line.
        """
        try:
            return cls.model_validate(json.loads(body) if body.strip() else {})
        except RecursionError:
            raise ValueError("it is nested too deeply") from None
        except ValidationError as error:
            faults = error.errors(include_url=False, include_context=False, include_input=False)
            told = [f"{'.'.join(str(part) for part in one['loc'])}: {one['msg']}" for one in faults[:_FAULTS]]
            more = [f"and {len(faults) - _FAULTS} more"] if len(faults) > _FAULTS else []
            raise ValueError("; ".join([*told, *more])) from None


class NothingRequest(Request):
    """A call without arguments."""


class LayerRequest(Request):
    """A call about one layer."""

    id: str = ""


class GetRequest(LayerRequest):
    """``Get``."""

    mount_label: str = Field("", validation_alias="mountlabel")


class CreateRequest(LayerRequest):
    """``Create`` and ``CreateReadWrite``."""

    parent: str = ""
    mount_label: str = Field("", validation_alias="mountlabel")
    storage_opt: dict[str, str] = Field({}, validation_alias="storageopt")

    def options(self) -> CreateOptions:
        """The same for a driver."""
        return CreateOptions(mount_label=self.mount_label, storage_options=self.storage_opt)


class DifferenceRequest(LayerRequest):
    """``Diff``, ``Changes``, ``DiffSize``, and the query of ``ApplyDiff``."""

    parent: str = ""


class IdRangeMessage(Request):
    """A range of an id map. The engine writes other names than its documentation has."""

    container_id: int = Field(0, validation_alias=AliasChoices("container_id", "containerid"))
    host_id: int = Field(0, validation_alias=AliasChoices("host_id", "hostid"))
    size: int = 0


class InitRequest(Request):
    """``Init``: the engine's start. Also what is kept of it on disk."""

    home: str = ""
    opts: list[str] = []
    uid_maps: list[IdRangeMessage] = Field([], validation_alias="uidmaps", serialization_alias="UIDMaps")
    gid_maps: list[IdRangeMessage] = Field([], validation_alias="gidmaps", serialization_alias="GIDMaps")

    def id_mapping(self) -> IdMapping:
        """The owners' mapping for a driver."""
        return IdMapping(
            *([IdRange(r.container_id, r.host_id, r.size) for r in ranges] for ranges in (self.uid_maps, self.gid_maps))
        )


class Reply(BaseModel):
    """What the engine gets; this one says that all went well."""

    model_config = ConfigDict(frozen=True, alias_generator=to_pascal, populate_by_name=True)

    def encode(self) -> bytes:
        """The body of the reply."""
        # Not pydantic's own JSON, which refuses the surrogates in names that are not UTF-8.
        return json.dumps(self.model_dump(by_alias=True)).encode() + b"\n"


class ErrorReply(Reply):
    """Why a call failed."""

    err: str


class ActivateReply(Reply):
    """What the plugin is for."""

    implements: list[str] = ["GraphDriver"]


class CapabilitiesMessage(Reply):
    """What the driver promises."""

    reproduces_exact_diffs: bool


class CapabilitiesReply(CapabilitiesMessage):
    """Nested, as the engine reads it, and at the top, as its documentation has it."""

    capabilities: CapabilitiesMessage


class GetReply(Reply):
    """Where the layer is mounted."""

    dir: str


class ExistsReply(Reply):
    """Whether there is such a layer."""

    exists: bool


class StatusReply(Reply):
    """Pairs for ``docker info``."""

    status: list[tuple[str, str]]


class MetadataReply(Reply):
    """What ``docker inspect`` shows as ``GraphDriver.Data``."""

    metadata: dict[str, str]


class ChangeMessage(Reply):
    """One line of ``docker diff``. Bytes of a path that are not UTF-8 are surrogates: JSON cannot have them."""

    path: str
    kind: int


class ChangesReply(Reply):
    """All lines of ``docker diff``."""

    changes: list[ChangeMessage]


class SizeReply(Reply):
    """A layer's size in bytes."""

    size: int
