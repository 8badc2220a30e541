"""What an image is: a configuration, and the layers that it names.

Source: OCI image specification, config.md; Docker's image specification v1.2, whose files have the same fields. Docker
writes ``null`` where there is nothing, and older versions a single text for a list.
"""

from __future__ import annotations

import hashlib
import platform as host
import re
from contextlib import suppress
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
        entrypoint, cmd: the program is the one followed by the other; a caller's own arguments replace ``cmd``.
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
        """From ``os/architecture[/variant]``; ``architecture[/variant]`` is of Linux, ``linux`` is this machine.

        Raises:
            ImageFormatError: it is written differently.
        """
        parts = text.lower().split("/")
        if parts == ["linux"]:
            return cls.of_this_machine()
        if parts[0] in _ARCHITECTURES:
            parts.insert(0, "linux")
        if not 2 <= len(parts) <= 3 or not all(parts):
            raise ImageFormatError(
                f"{text[:100]!r} is no platform; write OS/ARCHITECTURE[/VARIANT], such as linux/arm64"
            )
        architecture, variant = _ARCHITECTURES.get(parts[1], (parts[1], ""))
        given = parts[2] if len(parts) == 3 else ""
        return cls(
            os=parts[0], architecture=architecture, variant=f"v{given}" if given.isdecimal() else given or variant
        )

    @classmethod
    def of_this_machine(cls) -> Platform:
        """Where this program runs, with the most that its processor can do."""
        machine = host.machine().lower()
        architecture, variant = _ARCHITECTURES.get(machine, (machine, ""))
        if architecture == "amd64":
            variant = _amd64_level(_cpu_flags())
        return cls(os="linux", architecture=architecture, variant=variant or {"arm64": "v8"}.get(architecture, ""))

    def runs(self, other: Platform) -> bool:
        """Whether images for ``other`` are what is meant by this platform."""
        return self.rank(other) is not None

    def rank(self, other: Platform) -> tuple[int, ...] | None:
        """How well an image for ``other`` serves this platform: the lower the better; None: not at all.

        A processor runs what is made for older variants of its architecture, and the newest of those serves it best.
        As in containerd, ``arm`` alone is ``v7``, ``amd64`` is ``v1`` and ``arm64`` is ``v8``. Who asks for ``amd64``
        or ``arm64`` without a variant may mean any machine, and so gets what demands least.
        """
        if (self.os, self.architecture) != (other.os, other.architecture):
            return None
        usual = _USUAL_VARIANTS.get(self.architecture, "")
        wanted = _level(self.variant or (usual if self.architecture == "arm" else ""))
        its = _level(other.variant or usual)
        if not self.variant and not wanted:
            return its or (0,)
        if wanted and its:
            if its <= wanted:
                return tuple(-part for part in its)
            # An image that is only said to be for arm may be for an older one than usual.
            return None if other.variant else (0,)
        if not other.variant:
            return (0,)
        return (-1,) if self.variant == other.variant else None


# uname(2)'s machine, and what people write, to Go's GOARCH and the variant.
_ARCHITECTURES = {
    **{name: (name, "") for name in ("386", "amd64", "arm", "arm64", "loong64", "ppc64le", "riscv64", "s390x")},
    "x86_64": ("amd64", ""),
    "x86-64": ("amd64", ""),
    "aarch64": ("arm64", ""),
    "armel": ("arm", "v6"),
    "armhf": ("arm", "v7"),
    "armv5tel": ("arm", "v5"),
    "armv6l": ("arm", "v6"),
    "armv7l": ("arm", "v7"),
    "armv8l": ("arm", "v8"),
    "i386": ("386", ""),
    "i686": ("386", ""),
    "loongarch64": ("loong64", ""),
}
_USUAL_VARIANTS = {"amd64": "v1", "arm": "v7", "arm64": "v8"}
_LEVEL = re.compile(r"v?([0-9]+)(?:\.([0-9]+))?")
# x86-64 psABI, "Micro-Architecture Levels", with the names of /proc/cpuinfo (abm has lzcnt).
_AMD64_LEVELS = {
    "v2": frozenset(("cx16", "lahf_lm", "popcnt", "sse4_1", "sse4_2", "ssse3")),
    "v3": frozenset(("abm", "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe", "xsave")),
    "v4": frozenset(("avx512bw", "avx512cd", "avx512dq", "avx512f", "avx512vl")),
}


def _level(variant: str) -> tuple[int, ...]:
    """A number for ``v8`` or ``v8.2``; none for other variants, which have no order."""
    found = _LEVEL.fullmatch(variant)
    return (int(found[1]), int(found[2] or 0)) if found else ()


def _cpu_flags() -> frozenset[str]:
    with suppress(OSError), open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
        for line in file:
            name, _, flags = line.partition(":")
            if name.strip() == "flags":
                return frozenset(flags.split())
    return frozenset()


def _amd64_level(flags: frozenset[str]) -> str:
    level = "v1"
    for name, needed in _AMD64_LEVELS.items():
        if not needed <= flags:
            break
        level = name
    return level


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
