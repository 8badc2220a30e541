r"""containerd's filter expressions (pkg/filters), for what a snapshotter lists.

::

    filter    = selector *( "," selector )          all of them must match
    selector  = fieldpath [ operator value ]        without an operator: the field is there
    fieldpath = field *( "." field )                labels."containerd.io/gc.root"
    operator  = "==" | "!=" | "~="                  the last one: a regular expression finds something
    field     = letter or "_", then letters, digits, "_" | quoted
    value     = anything without "," and white space | quoted
    quoted    = as in Go: "..." with backslash escapes; a value also between / / or | |, with \/ and \| only

Regular expressions are RE2's, as Go's are: matching one takes time linear in the text, whatever it is.

A list of filters matches when one of them does. Fields of a snapshot are ``name``, ``parent``, ``kind`` (view, active,
committed) and ``labels.KEY``; there are no others, so that a selector with another name matches nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import re2

from unionfs.engines.snapshotter.contract import Info
from unionfs.errors import SnapshotArgumentError

Matcher = Callable[[Info], bool]

FILTERS_MAX_BYTES = 1 << 14
"""What the filters of one list may have together; containerd sends some hundred."""

_PROGRAM_MAX_BYTES = 1 << 18  # of a compiled regular expression
_SHOWN = 200  # characters of a filter, in a message

_FIELD = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_OPERATOR = re.compile(r"==|!=|~=")
_PLAIN_VALUE = re.compile(r"[^\s,]+")
_QUOTED = {mark: re.compile(rf"{re.escape(mark)}((?:[^\\{re.escape(mark)}]|\\.)*){re.escape(mark)}") for mark in '"/|'}


def compile_filters(filters: Sequence[str]) -> Matcher:
    """A function that tells whether a snapshot matches one of ``filters``; without any, every snapshot does.

    Raises:
        SnapshotArgumentError: a filter cannot be understood; the message says where. Or they are too long.
    """
    size = sum(len(text.encode()) for text in filters)
    if size > FILTERS_MAX_BYTES:
        raise SnapshotArgumentError(f"the filters have {size} bytes; make them at most {FILTERS_MAX_BYTES}")
    compiled = [_Parser(text).parse() for text in filters]
    if not compiled:
        return lambda info: True
    return lambda info: any(all(selector.matches(info) for selector in selectors) for selectors in compiled)


@dataclass(frozen=True, slots=True)
class _Selector:
    path: tuple[str, ...]
    operator: str
    value: str
    pattern: Any  # re2's compiled expression; None for the other operators

    def matches(self, info: Info) -> bool:
        found = _field(info, self.path)
        if self.operator == "":
            return found is not None
        if self.operator == "!=":
            return (found or "") != self.value
        if self.pattern is not None:
            return self.pattern.search((found or "").encode()) is not None
        return found is not None and found == self.value


def _field(info: Info, path: tuple[str, ...]) -> str | None:
    """The text at ``path``; None when there is none, for which containerd takes an empty one too."""
    match path:
        case ("name",):
            return info.name or None
        case ("parent",):
            return info.parent  # there, also when it is empty: containerd looks for "parent=="
        case ("kind",):
            return info.kind.name.lower()
        case ("labels", *rest) if rest:
            # A key with dots may be written without quotes.
            return info.labels.get(".".join(rest))
    return None


class _Parser:
    """One filter, read from left to right."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0

    def parse(self) -> list[_Selector]:
        selectors = [self._selector()] if self._text else []
        while self._at < len(self._text):
            self._expect(",")
            selectors.append(self._selector())
        return selectors

    def _selector(self) -> _Selector:
        path = [self._component()]
        while self._text.startswith(".", self._at):
            self._at += 1
            path.append(self._component())
        operator = self._take(_OPERATOR)
        if operator is None:
            return _Selector(tuple(path), "", "", None)
        value = self._value(operator == "~=")
        return _Selector(tuple(path), operator, value, self._pattern(value) if operator == "~=" else None)

    def _pattern(self, value: str) -> Any:
        options = re2.Options()
        options.max_mem = _PROGRAM_MAX_BYTES
        options.never_capture = True
        options.log_errors = False  # it would print them
        try:
            return re2.compile(value.encode(), options)
        except re2.error as error:
            why = error.args[0].decode(errors="replace")
            raise self._fault(f"{value[:_SHOWN]!r} is no regular expression of RE2 ({why[:_SHOWN]})") from None

    def _component(self) -> str:
        if self._text.startswith('"', self._at):
            return self._quoted('"')
        found = self._take(_FIELD)
        if found is None:
            raise self._fault("a field name is expected, such as name or labels.key")
        return found

    def _value(self, other_quotes: bool) -> str:
        mark = self._text[self._at : self._at + 1]
        if mark == '"' or (other_quotes and mark in ("/", "|")):
            return self._quoted(mark)
        found = self._take(_PLAIN_VALUE)
        if found is None:
            raise self._fault("a value is expected")
        return found

    def _quoted(self, mark: str) -> str:
        found = _QUOTED[mark].match(self._text, self._at)
        if found is None:
            raise self._fault(f"the quotation mark {mark} is not closed")
        self._at = found.end()
        if mark != '"':
            return found[1].replace("\\" + mark, mark)
        try:
            return str(json.loads(found[0], strict=False))  # what Go and JSON escape alike is all that occurs
        except ValueError:
            raise self._fault(f"{found[0]} has an escape that is not known") from None

    def _take(self, pattern: re.Pattern[str]) -> str | None:
        found = pattern.match(self._text, self._at)
        if found is None:
            return None
        self._at = found.end()
        return found[0]

    def _expect(self, word: str) -> None:
        if not self._text.startswith(word, self._at):
            raise self._fault(f"'{word}' is expected")
        self._at += len(word)

    def _fault(self, what: str) -> SnapshotArgumentError:
        return SnapshotArgumentError(
            f"filter {self._text[:_SHOWN]!r}: at character {self._at + 1}: {what}; correct the filter"
        )
