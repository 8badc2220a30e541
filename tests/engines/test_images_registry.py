"""What registries say in headers."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest

from unionfs.engines.images.registry.challenge import Challenge, parse_challenges
from unionfs.engines.images.registry.connection import Access
from unionfs.engines.images.registry.retry import retry_after


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        (['Basic realm="a"'], [Challenge("basic", {"realm": "a"})]),
        (
            ['Bearer realm="https://t/x?a=b,c",service="s s",scope="repository:a/b:pull,push"'],
            [
                Challenge(
                    "bearer", {"realm": "https://t/x?a=b,c", "service": "s s", "scope": "repository:a/b:pull,push"}
                )
            ],
        ),
        (['BEARER Realm = "a" , error=x'], [Challenge("bearer", {"realm": "a", "error": "x"})]),
        (
            ['Basic realm="a", Bearer realm="b"'],
            [Challenge("basic", {"realm": "a"}), Challenge("bearer", {"realm": "b"})],
        ),
        (["Negotiate", 'Basic realm="a\\"b"'], [Challenge("negotiate"), Challenge("basic", {"realm": 'a"b'})]),
        (['realm="a"', "", ",", '"', "Bearer ="], [Challenge("bearer")]),
        ([], []),
    ],
)
def test_challenges(headers: list[str], expected: list[Challenge]) -> None:
    assert parse_challenges(headers) == expected


def test_retry_after() -> None:
    assert retry_after("7") == 7
    assert retry_after(None) is None
    later = retry_after(format_datetime(datetime.now(UTC) + timedelta(hours=1), usegmt=True))
    assert later is not None
    assert 3000 < later <= 3600
    assert retry_after(format_datetime(datetime.now(UTC) - timedelta(hours=1), usegmt=True)) == 0
    for text in ("", "soon", "-1", "9" * 30, "Mon, 99 Foo"):
        assert retry_after(text) is None


def test_who_is_spoken_to_without_tls() -> None:
    for registry in ("localhost", "localhost:5000", "127.0.0.1:1", "127.9.9.9", "[::1]:5000"):
        assert Access().insecure(registry)
        assert not Access(plain_http=False).insecure(registry)
    for registry in ("docker.io", "localhost.example.com", "10.0.0.1:5000", "example.com:127"):
        assert not Access().insecure(registry)
        assert Access(plain_http=True).insecure(registry)
