"""As much of a kubelet as it takes to run a pod: a client of the container runtime interface (CRI), version 1.

Messages are written by their field numbers, as in ``k8s.io/cri-api/pkg/apis/runtime/v1/api.proto``; the format is
https://protobuf.dev/programming-guides/encoding/.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc

Message = dict[int, Any]
"""Field numbers to values: a text, a number, a message, or a list of these."""

_CALL_S = 120.0
_NODE = 2  # NamespaceMode: the machine's own


class Kubelet:
    """Talks to the runtime at a socket.

    Args:
        socket: containerd's.
        name: unique on this machine; names the pods and the control group that they are in.
    """

    def __init__(self, socket: Path, name: str) -> None:
        self._channel = grpc.insecure_channel(f"unix:{socket}")
        self._name = name

    def close(self) -> None:
        """Close the connection."""
        self._channel.close()

    def run_pod(self, name: str) -> tuple[str, Message]:
        """Make a pod's sandbox on the machine's network; its id and its configuration, for `run_container`."""
        config: Message = {
            1: {1: name, 2: f"{self._name}-{name}", 3: "default"},
            8: {1: f"/{self._name}", 2: {1: {1: _NODE}}},
        }
        return _text(self._call("RunPodSandbox", {1: config})[1]), config

    def run_container(self, pod: tuple[str, Message], name: str, image: str, *command: str) -> str:
        """Make and start a container; its id."""
        sandbox, sandbox_config = pod
        config: Message = {1: {1: name}, 2: {1: image}, 3: list(command)}
        container = _text(self._call("CreateContainer", {1: sandbox, 2: config, 3: sandbox_config})[1])
        self._call("StartContainer", {1: container})
        return container

    def execute(self, container: str, *command: str) -> str:
        """Run a command in a container; returns what it wrote. Fails unless it exits 0."""
        answer = self._call("ExecSync", {1: container, 2: list(command), 3: 60})
        assert not answer.get(3), f"exit status {answer[3]}: {answer}"
        return _text(answer.get(1, [b""]))

    def writable_layer_bytes(self, container: str) -> int:
        """What a container's own files take, as the kubelet is told for its limits; 0 when it is not known yet."""
        data = self._call("ContainerStats", {1: container})[1][0]
        for number in (4, 3):  # the writable layer, its size
            data = _decode(data).get(number, [b""])[0]
        return int(_decode(data).get(1, [0])[0])

    def remove_container(self, container: str) -> None:
        """Stop and remove a container."""
        self._call("StopContainer", {1: container})
        self._call("RemoveContainer", {1: container})

    def remove_pod(self, pod: tuple[str, Message]) -> None:
        """Stop and remove a pod with all its containers."""
        self._call("StopPodSandbox", {1: pod[0]})
        self._call("RemovePodSandbox", {1: pod[0]})

    def images(self) -> list[str]:
        """The names of the images that the kubelet may use."""
        answer = self._call("ListImages", {}, service="ImageService")
        return sorted(name.decode() for image in answer.get(1, []) for name in _decode(image).get(2, []))

    def _call(self, method: str, request: Message, *, service: str = "RuntimeService") -> dict[int, list[Any]]:
        call = self._channel.unary_unary(
            f"/runtime.v1.{service}/{method}", request_serializer=_encode, response_deserializer=_decode
        )
        answer: dict[int, list[Any]] = call(request, timeout=_CALL_S, wait_for_ready=True)
        return answer


def _encode(message: Message) -> bytes:
    out = b""
    for number, value in message.items():
        values: Sequence[Any] = value if isinstance(value, list) else [value]
        for one in values:
            if isinstance(one, int):
                out += _varint(number << 3) + _varint(one)
                continue
            data = one.encode() if isinstance(one, str) else _encode(one)
            out += _varint(number << 3 | 2) + _varint(len(data)) + data
    return out


def _decode(data: bytes) -> dict[int, list[Any]]:
    found: dict[int, list[Any]] = {}
    rest = iter(data)
    for tag in _varints(rest):
        kind = tag & 7
        if kind == 0:
            value: Any = next(_varints(rest))
        elif kind == 2:
            value = bytes(next(rest) for _ in range(next(_varints(rest))))
        else:
            value = bytes(next(rest) for _ in range({1: 8, 5: 4}[kind]))
        found.setdefault(tag >> 3, []).append(value)
    return found


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def _varints(data: Iterator[int]) -> Iterator[int]:
    """Numbers until the end."""
    for byte in data:
        number, shift = byte & 0x7F, 7
        while byte & 0x80:
            byte = next(data)  # noqa: PLW2901
            number |= (byte & 0x7F) << shift
            shift += 7
        yield number


def _text(values: list[bytes]) -> str:
    return values[0].decode(errors="surrogateescape")
