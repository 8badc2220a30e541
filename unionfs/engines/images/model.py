"""What an image is: a configuration, and the layers that it names.

Source: OCI image specification, config.md; Docker's image specification v1.2, whose files have the same fields. Docker
writes ``null`` where there is nothing, and older versions a single text for a list.
"""

from __future__ import annotations

import hashlib
import platform as host
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from unionfs.errors import ImageFormatError, InvalidDigestError
from unionfs.layers import MAX_DEPTH, ChainID, DiffID, create_chain_id
from unionfs.layers.identity import ALGORITHM, parse_digest

MAX_CONFIG_BYTES = 8 << 20
"""A configuration has a few KiB; a registry takes no manifest of more than 4 MiB, and neither does Docker."""


def _texts(value: Any) -> Any:
    return () if value is None else (value,) if isinstance(value, str) else value


def _keys(value: Any) -> Any:
    """Go's sets: ``{"80/tcp": {}}``."""
    return () if value is None else tuple(value) if isinstance(value, dict) else value


def _or(default: Any) -> BeforeValidator:
    return BeforeValidator(lambda value: default if value is None else value)


Texts = Annotated[tuple[str, ...], BeforeValidator(_texts)]
_Keys = Annotated[tuple[str, ...], BeforeValidator(_keys)]
_Text = Annotated[str, _or("")]


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", populate_by_name=True)


class ImageConfig(_Model):
    """How a container of the image is started.

    Attributes:
        env: ``NAME=value`` each.
        entrypoint, cmd: the program is the one followed by the other; a caller's own words replace ``cmd``.
        user: ``name``, ``uid``, ``name:group`` or ``uid:gid``; ``""`` is root.
        working_dir: ``""`` is ``/``.
        labels: free keys and values.
        exposed_ports: such as ``80/tcp``.
        volumes: paths in the container.
        stop_signal: a name or a number; ``""`` is SIGTERM.
    """

    env: Texts = Field((), alias="Env")
    entrypoint: Texts = Field((), alias="Entrypoint")
    cmd: Texts = Field((), alias="Cmd")
    user: _Text = Field("", alias="User")
    working_dir: _Text = Field("", alias="WorkingDir")
    labels: Annotated[dict[str, str], _or({})] = Field(default_factory=dict, alias="Labels")
    exposed_ports: _Keys = Field((), alias="ExposedPorts")
    volumes: _Keys = Field((), alias="Volumes")
    stop_signal: _Text = Field("", alias="StopSignal")


class HistoryEntry(_Model):
    """One step of how the image was made.

    Attributes:
        created: an RFC 3339 time, or ``""``.
        created_by: the command.
        comment: free text.
        empty_layer: whether the step made no layer.
    """

    created: _Text = ""
    created_by: _Text = ""
    comment: _Text = ""
    empty_layer: bool = False


class Platform(_Model):
    """What machine an image is for. OCI image specification, image-index.md, ``platform``.

    Attributes:
        os: such as ``linux``.
        architecture: Go's name, such as ``amd64``.
        variant: such as ``v7``; ``""`` where there is none.
    """

    os: _Text = "linux"
    architecture: _Text = ""
    variant: _Text = ""

    def __str__(self) -> str:
        return "/".join(part for part in (self.os, self.architecture, self.variant) if part)

    @classmethod
    def parse(cls, text: str) -> Platform:
        """From ``os/architecture[/variant]``.

        Raises:
            ImageFormatError: it is written differently.
        """
        parts = text.split("/")
        if not 2 <= len(parts) <= 3 or not all(parts):
            raise ImageFormatError(
                f"{text[:100]!r} is no platform; write OS/ARCHITECTURE[/VARIANT], such as linux/arm64"
            )
        os, architecture, *rest = (part.lower() for part in parts)
        return cls(os=os, architecture=_GO_NAMES.get(architecture, architecture), variant=rest[0] if rest else "")

    @classmethod
    def of_this_machine(cls) -> Platform:
        """Where this program runs."""
        machine = host.machine().lower()
        return cls(os="linux", architecture=_GO_NAMES.get(machine, machine), variant=_VARIANTS.get(machine, ""))

    def runs(self, other: Platform) -> bool:
        """Whether images for ``other`` are what is meant by this platform; a variant counts only where both have one.

        ``arm64`` is always ``v8``, so neither says more than the other.
        """
        if (self.os, self.architecture) != (other.os, other.architecture):
            return False
        return not self.variant or not other.variant or self.variant == other.variant


# uname(2)'s machine, and what people write, to Go's GOARCH.
_GO_NAMES = {
    "x86_64": "amd64",
    "x86-64": "amd64",
    "aarch64": "arm64",
    "armhf": "arm",
    "armv7l": "arm",
    "armv6l": "arm",
    "i386": "386",
    "i686": "386",
    "loongarch64": "loong64",
}
_VARIANTS = {"armv7l": "v7", "armv6l": "v6", "aarch64": "v8"}


class _RootFilesystem(_Model):
    type: _Text = "layers"
    diff_ids: Annotated[tuple[str, ...], _or(())] = ()


class _ConfigFile(_Model):
    """The file as it is stored. An index or a manifest given in its place has no ``rootfs``."""

    os: _Text = "linux"
    architecture: _Text = ""
    variant: _Text = ""
    created: _Text = ""
    author: _Text = ""
    config: Annotated[ImageConfig, _or({})] = Field(default_factory=lambda: ImageConfig.model_validate({}))
    rootfs: _RootFilesystem
    history: Annotated[tuple[HistoryEntry, ...], _or(())] = ()


@dataclass(frozen=True, slots=True)
class Image:
    """An image.

    Attributes:
        image_id: the digest of ``config_bytes``.
        config_bytes: the configuration exactly as it was made.
        config: how a container is started.
        platform: what it runs on.
        diff_ids: its layers, the lowest first.
        chain_id: all of them together, which is what a container stands on; ``""`` for no layers.
        created: an RFC 3339 time, or ``""``.
        author: free text.
        history: how it was made, the oldest step first.
        names: under which a store knows it, as people write them, sorted.
    """

    image_id: str
    config_bytes: bytes
    config: ImageConfig
    platform: Platform
    diff_ids: tuple[DiffID, ...]
    chain_id: ChainID
    created: str = ""
    author: str = ""
    history: tuple[HistoryEntry, ...] = ()
    names: tuple[str, ...] = ()


def digest_of(contents: bytes) -> str:
    """``sha256:`` and the digits."""
    return f"{ALGORITHM}:{hashlib.sha256(contents).hexdigest()}"


def parse_image(config_bytes: bytes, names: tuple[str, ...] = ()) -> Image:
    """The image of a configuration.

    Args:
        config_bytes: the JSON text.
        names: of the image, sorted.

    Raises:
        ImageFormatError: it is no image's configuration, or has more layers than a container can have.
    """
    if len(config_bytes) > MAX_CONFIG_BYTES:
        raise ImageFormatError(f"the image's configuration has more than {MAX_CONFIG_BYTES} bytes; it is none")
    try:
        file = _ConfigFile.model_validate_json(config_bytes)
        diff_ids = tuple(DiffID(parse_digest(text, "diff id")) for text in file.rootfs.diff_ids)
    except ValidationError as error:
        raise ImageFormatError(f"not an image's configuration: {first_problem(error)}") from error
    except InvalidDigestError as error:
        raise ImageFormatError(f"not an image's configuration: {error}") from error
    if file.rootfs.type != "layers":
        raise ImageFormatError(f"the image's rootfs is of type {file.rootfs.type[:50]!r}; only layers can be stored")
    if len(diff_ids) > MAX_DEPTH:
        raise ImageFormatError(f"the image has {len(diff_ids)} layers; {MAX_DEPTH} are the most a container can have")
    return Image(
        image_id=digest_of(config_bytes),
        config_bytes=config_bytes,
        config=file.config,
        platform=Platform(os=file.os, architecture=file.architecture, variant=file.variant),
        diff_ids=diff_ids,
        chain_id=create_chain_id(diff_ids),
        created=file.created,
        author=file.author,
        history=file.history,
        names=names,
    )


def first_problem(error: ValidationError) -> str:
    """The first thing that is wrong, on one line."""
    problem = error.errors(include_url=False, include_input=False, include_context=False)[0]
    where = ".".join(str(part) for part in problem["loc"])[:100]
    text = problem["msg"].replace("\n", " ")
    return f"{where}: {text}" if where else text
