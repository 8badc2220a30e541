"""The snapshotter's service and clients that mean no good: none keeps others waiting, or gets more than one line."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.engines.snapshotter_client import SnapshotterClient
from tests.engines.snapshotter_rig import remove_all
from tests.support.mounts import wait_until
from tests.support.sandbox import needs_root
from unionfs.engines.snapshotter import UnionSnapshotter, service
from unionfs.engines.snapshotter.messages import SERVICE, message_class
from unionfs.engines.snapshotter.service import SocketServer, make_handler
from unionfs.errors import SnapshotArgumentError, SnapshotNotFoundError

needs_root()

PATIENCE_S = 60.0


@pytest.fixture
def path(tmp_path: Path) -> Iterator[str]:
    store = UnionSnapshotter(str(tmp_path / "root"))
    server = SocketServer(str(tmp_path / "socket"), make_handler(store))
    server.start()
    try:
        yield server.path
    finally:
        server.stop(5)
        remove_all(store)
        store.close()


@pytest.fixture
def client(path: str) -> Iterator[SnapshotterClient]:
    made = SnapshotterClient(path)
    yield made
    made.close()


def channel(path: str, opened: ExitStack) -> grpc.Channel:
    """A connection of its own."""
    made = grpc.insecure_channel(f"unix:{path}", options=[("grpc.use_local_subchannel_pool", 1)])
    opened.callback(made.close)
    return made


def fill(client: SnapshotterClient, number: int, labels: int) -> None:
    """Make snapshots with large labels; more of them than gRPC takes for a client that does not read."""
    for at in range(number):
        client.view(f"v{at}", labels={f"{label:03}": "x" * 4000 for label in range(labels)})


@pytest.mark.parametrize("method", ["Stat", "List", "Prepare", "Cleanup"])
@pytest.mark.parametrize("sent", [b"\xff" * 10, b"\x0a\x02\xff\xfe", None])  # no tags, no UTF-8, nothing at all
def test_what_is_no_message_is_told_in_one_line(
    path: str, method: str, sent: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    with ExitStack() as opened:
        call: Any = channel(path, opened).stream_stream(f"/{SERVICE}/{method}")
        with pytest.raises(grpc.RpcError) as caught:
            list(call(iter([] if sent is None else [sent]), timeout=PATIENCE_S))
        error: Any = caught.value
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert error.details().startswith(f"{method}: the request is no {service.REQUESTS[method]}")
        assert "\n" not in error.details()
    assert caplog.text == ""


def test_names_of_any_length_are_told(client: SnapshotterClient) -> None:
    with pytest.raises(SnapshotNotFoundError, match=r"snapshot ä+…ä+ does not exist$") as caught:
        client.stat("ä" * 1_000_000)
    assert len(str(caught.value)) < 1000
    with pytest.raises(SnapshotArgumentError):
        client.walk(["=" * 16_000])


def test_a_list_comes_in_pieces_that_a_client_takes(client: SnapshotterClient) -> None:
    fill(client, 12, 200)  # 800 kB each; a client takes 4 MiB at once unless it says otherwise
    assert len(client.walk()) == 12
    assert client.messages > 2


def test_requests_that_do_not_come_keep_nobody_waiting(path: str, client: SnapshotterClient) -> None:
    client.prepare("a")
    never = threading.Event()
    with ExitStack() as opened:
        opened.callback(never.set)
        for _ in range(5):
            stat: Any = channel(path, opened).stream_unary(f"/{SERVICE}/Stat")
            calls = [stat.future(iter(never.wait, None)) for _ in range(60)]
            opened.callback(lambda calls=calls: [one.cancel() for one in calls])  # type: ignore[misc]
        assert client.stat("a").name == "a"


def test_lists_that_are_not_read_keep_nobody_waiting(path: str, client: SnapshotterClient) -> None:
    fill(client, 12, 200)
    request = message_class("ListSnapshotsRequest")().SerializeToString()
    with ExitStack() as opened:
        for _ in range(5):
            listing: Any = channel(path, opened).unary_stream(f"/{SERVICE}/List")
            for _ in range(10):
                opened.callback(listing(request).cancel)
        assert client.stat("v0").name == "v0"


def test_other_bytes_do_no_harm(path: str, client: SnapshotterClient) -> None:
    for sent in (b"GET / HTTP/1.1\r\n\r\n", b"\0" * 1000, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 100):
        with socket.socket(socket.AF_UNIX) as made:
            made.connect(path)
            made.sendall(sent)
            made.settimeout(0.2)
            try:
                made.recv(1000)
            except OSError:
                pass
    assert client.walk() == []


def test_more_than_a_message_may_have_is_refused(path: str) -> None:
    with ExitStack() as opened:
        call: Any = channel(path, opened).unary_unary(f"/{SERVICE}/Stat")
        with pytest.raises(grpc.RpcError) as caught:
            call(bytes(5 << 20), timeout=PATIENCE_S)
        error: Any = caught.value
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def waiting() -> bool:
    """Whether a call waits for its client."""
    return any(isinstance(thread, threading.Timer) for thread in threading.enumerate())


def test_a_call_that_stalls_is_ended(path: str, client: SnapshotterClient, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(client, 12, 200)
    monkeypatch.setattr(service, "_STALL_S", 0.3)
    never = threading.Event()
    with ExitStack() as opened:
        opened.callback(never.set)
        made = channel(path, opened)
        stat: Any = made.stream_unary(f"/{SERVICE}/Stat")
        with pytest.raises(grpc.RpcError) as caught:
            stat(iter(never.wait, None), timeout=PATIENCE_S)
        error: Any = caught.value
        assert error.code() is grpc.StatusCode.CANCELLED
        listing: Any = made.unary_stream(f"/{SERVICE}/List")
        call = listing(message_class("ListSnapshotsRequest")().SerializeToString(), timeout=PATIENCE_S)
        assert wait_until(waiting, PATIENCE_S)
        assert wait_until(lambda: not waiting(), PATIENCE_S)
        with pytest.raises(grpc.RpcError) as caught:
            list(call)
        error = caught.value
        assert error.code() is grpc.StatusCode.CANCELLED
