"""DiffID and ChainID against the vectors of the OCI image specification, and the random ids."""

from __future__ import annotations

import hashlib
import re

import pytest

from unionfs.errors import InvalidDigestError
from unionfs.layers import identity
from unionfs.layers.identity import create_chain_id, diff_id_of, digits_of, extend_chain, parse_digest

A, B, C = ("sha256:" + hashlib.sha256(letter).hexdigest() for letter in (b"a", b"b", b"c"))
EMPTY = "sha256:5f70bf18a086007016e948b04aed3b82103a36bea41755b6cddfaf10ace3c6ef"


@pytest.mark.parametrize(
    ("diff_ids", "chain_id"),
    [
        ([], ""),
        ([A], A),
        ([A, B], "sha256:51c0c8ace48498d6f5fee6b0592cc06f2da0f3cbe09c5a34a97dce85c3889676"),
        ([A, B, C], "sha256:2fce7f8ce91bcf0a1428b36e1024639fdbd9469eea762dba98aa749631885106"),
        ([EMPTY, EMPTY], "sha256:170b376f64fb30995c140276be3d71dfb256b308d86183ca3b22aa93a79ad548"),
    ],
)
def test_chain_id(diff_ids: list[str], chain_id: str) -> None:
    """Row 83."""
    assert create_chain_id(diff_ids) == chain_id


def test_chains_are_built_one_layer_at_a_time() -> None:
    below = create_chain_id([A, B])
    assert extend_chain(below, diff_id_of(b"c")) == create_chain_id([A, B, C])


def test_diff_id_of_an_empty_archive() -> None:
    assert diff_id_of(bytes(1024)) == EMPTY


@pytest.mark.parametrize("text", [A, EMPTY])
def test_valid_digests(text: str) -> None:
    assert parse_digest(text) == text
    assert digits_of(text) == text[7:]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "sha256",
        "sha256:",
        A[:-1],
        A + "0",
        A.upper(),
        A[7:],
        "sha512:" + A[7:],
        A + "\n",
        " " + A,
        "sha256:" + "g" * 64,
    ],
)
def test_invalid_digests(text: str) -> None:
    with pytest.raises(InvalidDigestError, match="invalid chain id"):
        parse_digest(text, "chain id")


# moby's TestIsValidID.
@pytest.mark.parametrize(
    ("text", "valid"),
    [
        ("c53f7fd5dd7a2a5a1d0a6cf7a2b1c9d2f1f8e3b4a5c6d7e8f90123456789abcd", True),
        ("c53f7fd5dd7a2a5a1d0a6cf7a2b1c9d2f1f8e3b4a5c6d7e8f90123456789abcd-init", True),
        ("c53f7fd5dd7a2a5a1d0a6cf7a2b1c9d2f1f8e3b4a5c6d7e8f90123456789abc", False),
        ("c53f7fd5dd7a2a5a1d0a6cf7a2b1c9d2f1f8e3b4a5c6d7e8f90123456789abcde", False),
        ("C53F7FD5DD7A2A5A1D0A6CF7A2B1C9D2F1F8E3B4A5C6D7E8F90123456789ABCD", False),
        ("g53f7fd5dd7a2a5a1d0a6cf7a2b1c9d2f1f8e3b4a5c6d7e8f90123456789abcd", False),
        ("", False),
        ("-init", False),
    ],
)
def test_is_valid_id(text: str, valid: bool) -> None:
    assert identity.is_valid_id(text) is valid


def test_new_ids_are_valid_and_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = {identity.new_id() for _ in range(100)}
    assert len(ids) == 100
    assert all(re.fullmatch("[a-f0-9]{64}", one) for one in ids)
    tries = iter(["1" * 12 + "a" * 52, "1" * 11 + "a" + "1" * 52])
    monkeypatch.setattr("secrets.token_hex", lambda _: next(tries))
    assert identity.new_id() == "1" * 11 + "a" + "1" * 52
