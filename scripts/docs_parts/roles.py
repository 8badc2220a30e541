"""Docstrings as Markdown: they are written for Sphinx' roles and literal blocks, which read well in the source."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:mod|class|func|meth|attr|data|exc):`~?([^`]+)`")
_LITERAL = re.compile(r"::(\n\n(?: {4}.*\n?|\n)+)")


class Roles(griffe.Extension):
    """Makes code spans of roles, and indented code of literal blocks."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called with each object that was read."""
        if obj.docstring is not None:
            text = _ROLE.sub(r"`\1`", obj.docstring.value)
            obj.docstring.value = re.sub(r"(?m)^::$", "", re.sub(r"(?m)(\S)::$", r"\1:", text))
