"""What a registry asks for with ``WWW-Authenticate``. Source: RFC 9110, 11.6.1; distribution's token specification."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

_TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_PARAMETER = re.compile(rf'\s*({_TOKEN})\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^\s,]*))\s*(?:,|$)')
_SCHEME = re.compile(rf"\s*({_TOKEN})(?:\s+|$)")


@dataclass(frozen=True, slots=True)
class Challenge:
    """One scheme with its parameters.

    Attributes:
        scheme: in lower case.
        parameters: by their names in lower case.
    """

    scheme: str
    parameters: dict[str, str] = field(default_factory=dict)


def parse_challenges(headers: list[str]) -> list[Challenge]:
    """All challenges in the headers; what cannot be understood is left out."""
    found: list[Challenge] = []
    for header in headers:
        at = 0
        while at < len(header):
            parameter = _PARAMETER.match(header, at)
            if parameter and found:
                name, quoted, plain = parameter.groups()
                value = re.sub(r"\\(.)", r"\1", quoted) if quoted is not None else plain
                found[-1].parameters[name.lower()] = value
                at = parameter.end()
                continue
            scheme = _SCHEME.match(header, at)
            if scheme is None:
                break
            found.append(Challenge(scheme[1].lower()))
            at = scheme.end()
    return found
