"""The project's own rules: which package may know which, what every module and every document has."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from pathlib import Path

import pytest

import unionfs.fuse_ops.union.union_tree
from tests.support import durations
from tests.support.compiled import compiled_bases, compiled_sources, miscompiled

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "unionfs"

# Each layer may import those below it; archive and fuse_ops lie side by side (docs/design/architecture.md).
LAYERS = [{"cli"}, {"engines"}, {"layers", "testing"}, {"drivers"}, {"archive", "fuse_ops"}, {"overlay"}, {"host"}]
# The rooms of the file system, by the same rule.
ROOMS = [
    {"session"},
    {"transports"},
    {"speedups"},
    {"requests"},
    {"union"},
    {"copy_up"},
    {"quota"},
    {"tree"},
    {"stack"},
]
# What anything may import, and that imports nothing of ours: a module, and a function of the package itself.
FOUNDATION = {"errors", "publish"}


def level_of(part: str, layers: list[set[str]]) -> int:
    return next(i for i, names in enumerate(layers) if part in names)


def imported_modules(path: Path, module: str) -> Iterator[tuple[int, str]]:
    """(line, absolute module name) for every import statement in a file, those inside functions too."""
    for node in ast.walk(ast.parse(path.read_bytes(), str(path))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
                base = ".".join([*package[: len(package) - node.level + 1], *([base] if base else [])])
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}"


# Not an option of that name, nor a file: that is for who looks at the packages to tell.
MODULE_NAME = re.compile(r"(?<![\w./-])unionfs(?:\.[a-z_]\w*)+")


def modules_in_strings(path: Path) -> Iterator[tuple[int, str]]:
    """(line, absolute module name) for modules that are imported, run (``python -m``) or found by name."""
    tree = ast.parse(path.read_bytes(), str(path))
    documentation = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation:
            for name in MODULE_NAME.findall(node.value):
                yield node.lineno, name


def wrong_imports(
    package: Path, layers: list[set[str]] = LAYERS, foundation: AbstractSet[str] = frozenset(FOUNDATION)
) -> list[str]:
    """Imports and names of modules in ``package`` that do not point down, as "file:line: importer -> imported"."""
    found = []
    parents = [package.name]  # of a room: the package itself, and the one it is in
    while (package.parents[len(parents) - 1] / "__init__.py").exists():
        parents.insert(0, package.parents[len(parents) - 1].name)
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        importer = parts[0]
        module = ".".join([*parents, *(part for part in parts if part != "__init__")])
        known = set().union(*layers)
        named = [one for one in modules_in_strings(path) if known & {*one[1].split(".")[len(parents) :][:1]}]
        for line, name in [*imported_modules(path, module), *named]:
            pieces = name.split(".")
            if pieces[0] == "tests" or pieces[0] == "scripts":
                found.append(f"{path}:{line}: {importer} -> {name}")
            if pieces[: len(parents)] != parents or len(pieces) == len(parents):
                continue
            imported = pieces[len(parents)]
            if imported in foundation or imported.startswith("__") or importer == imported:
                continue
            if importer == "__init__":
                continue  # the package itself only names what is public
            if importer in foundation or level_of(imported, layers) <= level_of(importer, layers):
                found.append(f"{path}:{line}: {importer} -> {imported}")
    return found


def test_imports_point_downwards() -> None:
    assert wrong_imports(PACKAGE) == []
    assert wrong_imports(PACKAGE / "fuse_ops", ROOMS, {"options"}) == []


@pytest.mark.parametrize(
    ("where", "statement", "bad"),
    [
        ("cli/a.py", "from unionfs.fuse_ops import b", False),
        ("drivers/a.py", "import unionfs.archive.b", False),
        ("fuse_ops/a.py", "from unionfs.errors import E", False),
        ("fuse_ops/a.py", "from unionfs import __version__", False),
        ("fuse_ops/a.py", "from unionfs.archive import b", True),
        ("fuse_ops/a.py", "from ..archive import b", True),
        ("fuse_ops/__init__.py", "from .. import archive", True),
        ("archive/a.py", "import unionfs.fuse_ops.b", True),
        ("archive/a.py", "def f():\n    from unionfs import drivers", True),
        ("layers/a.py", "import unionfs.engines", True),
        ("errors.py", "from unionfs.archive import b", True),
        ("archive/a.py", "from tests.support import b", True),
        ("drivers/a.py", 'run([executable, "-P", "-m", "unionfs.cli.program", *words])', True),
        ("drivers/a.py", 'run(f"{executable} -m unionfs.cli.program {word}")', True),
        ("drivers/a.py", 'entry_points(group="unionfs.engines")', True),
        ("drivers/a.py", 'run([executable, "-m", "unionfs.fuse_ops.session.program"])', False),
        ("drivers/a.py", 'get("unionfs.size", "/x/unionfs.cli", "my-unionfs.cli")', False),
        ("drivers/a.py", '"""What unionfs.cli does with it."""', False),
    ],
)
def test_the_import_rule_is_applied(tmp_path: Path, where: str, statement: str, bad: bool) -> None:
    path = tmp_path / "unionfs" / where
    path.parent.mkdir(parents=True)
    path.write_text(statement)
    assert bool(wrong_imports(tmp_path / "unionfs")) is bad


@pytest.mark.parametrize(
    ("where", "statement", "bad"),
    [
        ("requests/a.py", "from unionfs.fuse_ops.tree.b import c", False),
        ("tree/a.py", "from unionfs.fuse_ops.copy_up.b import c", True),
        ("tree/deeper/a.py", "import unionfs.fuse_ops.union", True),
        ("tree/a.py", "from ..requests import b", True),
        ("options.py", "from unionfs.fuse_ops.stack import b", True),
        ("stack/a.py", "from unionfs.fuse_ops.options import b", False),
        ("tree/a.py", 'import_module("unionfs.fuse_ops.session.a")', True),
    ],
)
def test_the_rule_is_applied_to_rooms(tmp_path: Path, where: str, statement: str, bad: bool) -> None:
    rooms = tmp_path / "unionfs" / "fuse_ops"
    path = rooms / where
    path.parent.mkdir(parents=True)
    path.write_text(statement)
    (tmp_path / "unionfs" / "__init__.py").touch()
    assert bool(wrong_imports(rooms, ROOMS, {"options"})) is bad


def test_the_c_library_is_loaded_in_one_place() -> None:
    found = [path for path in PACKAGE.rglob("*.py") if "CDLL(None" in path.read_text()]
    assert found == [PACKAGE / "host" / "syscalls.py"]


def test_no_import_goes_round() -> None:
    """Not even one that only types need: what knows of each other is one module, or has a third one below both."""
    paths = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}
    imports: dict[str, set[str]] = {}
    for module, path in paths.items():
        names = {name for _, name in imported_modules(path, module)}
        imports[module] = {m for name in names for m in (name, name.rpartition(".")[0]) if m in paths and m != module}
    # What is left, when nothing is that imports no other or that no other imports, is in a circle or between two.
    while ends := {
        m for m in imports if not imports[m] & imports.keys() or not any(m in names for names in imports.values())
    }:
        for module in ends:
            del imports[module]
    assert imports == {}


def test_every_package_has_its_place() -> None:
    known = set().union(*LAYERS)
    packages = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    rooms = {path.relative_to(PACKAGE / "fuse_ops").parts[0] for path in PACKAGE.glob("fuse_ops/*/*.py")}
    assert rooms | {path.stem for path in PACKAGE.glob("fuse_ops/[!_]*.py")} == set().union(*ROOMS, {"options"})
    assert packages <= known, "add the new package to LAYERS, where it belongs, and to docs/design/architecture.md"


def python_files() -> list[Path]:
    return [path for top in ("unionfs", "scripts", "tests") for path in sorted((ROOT / top).rglob("*.py"))]


def test_every_module_says_what_it_is() -> None:
    for path in python_files():
        if path.name == "__init__.py" and path.stat().st_size == 0 and ROOT / "tests" in path.parents:
            continue  # only makes a directory of tests a package
        text = ast.get_docstring(ast.parse(path.read_bytes(), str(path)))
        assert text, f"{path} has no docstring"
        first = text.splitlines()[0]
        assert len(first) > 10, f"{path}: '{first}' says too little"


@pytest.mark.parametrize("script", ["scripts/setup", "scripts/test", "scripts/quickstart", "scripts/build", ".ci/run"])
def test_scripts_can_be_run(script: str) -> None:
    path = ROOT / script
    assert os.access(path, os.X_OK)
    assert path.read_text().startswith("#!/bin/bash\n")
    subprocess.run(["bash", "-n", path], check=True)


def documents() -> list[Path]:
    return [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]


def commands_in(text: str) -> Iterator[str]:
    """The lines of a Markdown text's shell blocks, continued lines joined, comments left out."""
    for block in re.findall(r"^```(?:sh|bash|console)\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        for line in block.replace("\\\n", " ").splitlines():
            if command := line.strip().removeprefix("$ "):
                yield command


def test_readme_names_commands_that_exist() -> None:
    commands = list(commands_in((ROOT / "README.md").read_text()))
    assert "scripts/quickstart" in commands
    assert "scripts/test" in commands
    ours = [word for command in commands for word in command.split() if re.match(r"(scripts/|unionfs)", word)]
    assert ours
    for word in ours:
        where = ROOT / word if word.startswith("scripts/") else ROOT / ".venv" / "bin" / word
        assert os.access(where, os.X_OK), f"README.md tells people to run {word}, which is not there"


def test_readme_uses_options_that_exist() -> None:
    helps = {
        command: subprocess.run(
            [*argv, "--help"], cwd=ROOT, check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL
        ).stdout
        for command, argv in {
            "scripts/quickstart": [str(ROOT / ".venv/bin/python"), "scripts/quickstart.py"],
            "scripts/setup": ["scripts/setup"],
            "unionfs mount ": [str(ROOT / ".venv/bin/unionfs"), "mount"],
            "unionfs umount ": [str(ROOT / ".venv/bin/unionfs"), "umount"],
            "unionfs mounts": [str(ROOT / ".venv/bin/unionfs"), "mounts"],
        }.items()
    }
    used = 0
    for command in commands_in((ROOT / "README.md").read_text()):
        for name, text in helps.items():
            if name in command:
                for option in re.findall(r"\s(--[a-z-]+)", command.partition("#")[0]):
                    assert option in text, f"'{command}' in README.md: there is no {option}"
                    used += 1
    assert used > 3


def test_links_between_documents_lead_somewhere() -> None:
    for document in documents():
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name} points to {target}, which is not there"


def test_the_walks_name_methods_that_exist() -> None:
    """docs/design/architecture.md and docs/how-it-works.md lead a maintainer through the code by names to grep for."""
    methods: dict[str, set[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.ClassDef):
                found = {item.name for item in node.body if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef)}
                methods.setdefault(node.name, set()).update(found)
    named = 0
    for document in ("docs/design/architecture.md", "docs/how-it-works.md"):
        for name, method in re.findall(r"`(_?[A-Z]\w+)\.([a-z_]\w*)`", (ROOT / document).read_text()):
            assert method in methods.get(name, ()), f"{document} names {name}.{method}, which is not there"
            named += 1
    assert named > 40


def test_what_was_compiled_is_what_is_there() -> None:
    """Nobody tests a file that is not the one he reads."""
    sources = compiled_sources()
    assert len(sources) > 25
    compiled = {path.with_name(path.name.partition(".")[0] + ".py"): path for path in ROOT.glob("unionfs/**/*.so")}
    program = Path(sys.executable).with_name("unionfs-mount")
    version = subprocess.run([program, "--version"], capture_output=True, text=True, check=True)
    assert ("(compiled)" in version.stdout) == bool(compiled)
    if os.environ.get("UNIONFS_COMPILE") == "0":
        assert compiled == {}
        return
    assert set(compiled) == set(sources)
    for source, made in compiled.items():
        assert source.stat().st_mtime <= made.stat().st_mtime, f"{source} was changed; run scripts/setup"
    assert unionfs.fuse_ops.union.union_tree.__file__ == str(compiled[ROOT / "unionfs/fuse_ops/union/union_tree.py"])


def test_no_class_inherits_from_a_compiled_one_without_being_compiled() -> None:
    compiled = set(compiled_sources())
    found = {path: compiled_bases(path) for path in python_files() if path not in compiled}
    assert {path: places for path, places in found.items() if places} == {}


def test_a_class_that_does_is_found(tmp_path: Path) -> None:
    module = (
        "from unionfs.fuse_ops.tree.inodes import Inode\nimport os\nclass A(Inode): pass\nclass B(os.PathLike): pass\n"
    )
    (tmp_path / "a.py").write_text(module)
    assert compiled_bases(tmp_path / "a.py") == ["3: A"]


def test_nothing_that_is_compiled_waits_while_it_handles_an_exception() -> None:
    found = {source: miscompiled(ast.parse(source.read_bytes(), str(source))) for source in compiled_sources()}
    assert {source: places for source, places in found.items() if places} == {}


@pytest.mark.parametrize(
    ("body", "bad"),
    [
        ("try: pass\nexcept OSError: yield 1", True),
        ("try: pass\nexcept OSError:\n try: yield from g()\n finally: pass", True),
        ("try: pass\nfinally: yield 1", True),
        ("try: pass\nexcept OSError:\n with a(): x = yield 1", True),
        ("try: yield 1\nexcept OSError: pass\nelse: yield 2\nfinally: pass", False),
        ("try: pass\nexcept OSError:\n def f(): yield 1", False),
        ("with a(): yield 1", False),
    ],
)
def test_the_rule_of_waiting_is_applied(body: str, bad: bool) -> None:
    awaiting = body.replace("yield from", "await").replace("yield", "await")
    for text in (f"def f():\n{body}", f"async def f():\n{awaiting}"):
        assert bool(miscompiled(ast.parse(text.replace("\n", "\n    ")))) is bad, text


def test_the_rule_of_waiting_knows_the_end_of_a_nursery() -> None:
    assert miscompiled(ast.parse("async def f():\n    async with nursery():\n        pass")) == ["2: f"]


def test_the_list_of_slow_tests_names_tests_that_exist() -> None:
    for name in sorted(durations.listed()):
        path, _, function = name.partition("::")
        function = function.rpartition("::")[2]
        text = (ROOT / path).read_text()
        if "from unionfs.testing import" in text:  # its classes inherit tests
            text += "".join(suite.read_text() for suite in (PACKAGE / "testing").glob("*.py"))
        assert re.search(rf"^ *(async )?def {function}\(", text, re.MULTILINE), (
            f"tests/slow.txt: there is no {name}; scripts/test --note-slow {path} writes it anew"
        )
