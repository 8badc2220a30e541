"""The modules that mypyc compiles, and what it makes wrong code of."""

from __future__ import annotations

import ast
import runpy
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent

Function = ast.FunctionDef | ast.AsyncFunctionDef


def compiled_sources() -> list[Path]:
    """The modules that setup.py has compiled, whether they are or not."""
    names = runpy.run_path(str(ROOT / "setup.py"), run_name="setup")["compiled_modules"]()
    return [ROOT / name for name in names]


def _own_nodes(function: Function) -> Iterator[tuple[ast.AST, bool]]:
    """Everything in ``function`` but in functions inside of it, and whether it is in an ``except`` or ``finally``."""
    pending: list[tuple[ast.AST, bool]] = [(node, False) for node in function.body]
    while pending:
        node, handling = pending.pop()
        yield node, handling
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        ending = node.finalbody if isinstance(node, ast.Try | ast.TryStar) else []
        for child in ast.iter_child_nodes(node):
            inside = handling or isinstance(child, ast.ExceptHandler) or any(child is last for last in ending)
            pending.append((child, inside))


def _functions(tree: ast.AST) -> Iterator[Function]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def miscompiled(tree: ast.AST) -> list[str]:
    """The places, as "line: function", where a function waits while it handles an exception.

    mypy 2.4's mypyc does not give the caller his own exception back at a ``yield`` or ``await`` in an ``except``, or
    in a ``finally`` that an exception leads to. Who then raises or handles one ends in SIGSEGV. An ``async with``
    waits in such a place for its end, and an ``async for`` may.
    """
    return [
        f"{getattr(node, 'lineno', 0)}: {function.name}"
        for function in _functions(tree)
        for node, handling in _own_nodes(function)
        if isinstance(node, ast.AsyncWith | ast.AsyncFor)
        or (handling and isinstance(node, ast.Yield | ast.YieldFrom | ast.Await))
    ]


def generators(source: Path) -> dict[str, set[int]]:
    """The generators of a module, with the lines at which each of them yields."""
    found: dict[str, set[int]] = {}
    for function in _functions(ast.parse(source.read_bytes(), str(source))):
        nodes = [node for node, _ in _own_nodes(function) if isinstance(node, ast.Yield | ast.YieldFrom)]
        if nodes:
            found[function.name] = {node.lineno for node in nodes}
    return found


def compiled_bases(source: Path) -> list[str]:
    """The classes of a module that is not compiled which inherit from one that is, as "line: class": they cannot."""
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in compiled_sources()}
    tree = ast.parse(source.read_bytes(), str(source))
    names = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module in modules
        for alias in node.names
    }
    return [
        f"{node.lineno}: {node.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        for base in node.bases
        if isinstance(base, ast.Name) and base.id in names
    ]
