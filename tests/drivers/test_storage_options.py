"""Options and sizes as Docker writes them."""

from __future__ import annotations

import pytest

from unionfs.drivers.storage_options import layer_options, parse_options, parse_switch, split_option
from unionfs.errors import OptionError
from unionfs.fuse_ops.session.option_text import parse_size


@pytest.mark.parametrize(
    ("text", "pair"),
    [
        ("key=value", ("key", "value")),
        ("key=v1=v2", ("key", "v1=v2")),
        ("key = value ", ("key", "value")),
        ("key=", ("key", "")),
    ],
)
def test_parse_key_value_opt(text: str, pair: tuple[str, str]) -> None:
    assert split_option(text) == pair


def test_option_without_equals() -> None:
    with pytest.raises(OptionError, match="unable to parse storage-opt key/value: key"):
        split_option("key")


def test_keys_are_compared_in_lower_case_and_the_last_counts() -> None:
    assert parse_options(["A.Size=1", "a.size=2"], ["a.size"], "a") == {"a.size": "2"}
    assert layer_options({"SIZE": "1"}, ["size"], "a") == {"size": "1"}


@pytest.mark.parametrize(("known", "advice"), [(["a.size"], "use one of a.size"), ([], "it has none")])
def test_unknown_key(known: list[str], advice: str) -> None:
    with pytest.raises(OptionError, match=f"a: unknown option a.colour; {advice}"):
        parse_options(["a.colour=red"], known, "a")


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("32", 32),
        ("32b", 32),
        ("32B", 32),
        ("32k", 32 << 10),
        ("32K", 32 << 10),
        ("32kb", 32 << 10),
        ("32KiB", 32 << 10),
        ("32 Kb", 32 << 10),
        ("32Mb", 32 << 20),
        ("1.5G", 3 << 29),
        (".5k", 512),
        ("32tb", 32 << 40),
        ("2Pb", 2 << 50),
        (" 10G ", 10 << 30),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "-1", "big", "1 2", "0x10", "1e3", "10  G", "٣"])
def test_invalid_sizes(text: str) -> None:
    with pytest.raises(OptionError, match="invalid size"):
        parse_size(text)


@pytest.mark.parametrize("text", ["10q", "10gg", "10kbb", "10bb", "10bib", "10ki"])
def test_invalid_suffixes(text: str) -> None:
    with pytest.raises(OptionError, match="invalid suffix"):
        parse_size(text)


def test_too_large() -> None:
    with pytest.raises(OptionError, match="too large"):
        parse_size("9000p")
    with pytest.raises(OptionError, match="too large"):
        parse_size("9" * 400)


def test_switches() -> None:
    assert parse_switch("k", "True")
    assert not parse_switch("k", "off")
    with pytest.raises(OptionError, match="k=maybe: write k=true or k=false"):
        parse_switch("k", "maybe")
