"""Every Python example of the guides and of the public docstrings runs, as it stands, in a directory with layers."""

from __future__ import annotations

import ast
import os
import re
import shutil
import stat
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import mount_points_below
from tests.layers.archives import archive, member
from tests.support.mounts import servers_of, take_down

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "docs/library.md", "docs/drivers.md", "docs/archives.md", "docs/layer-store.md")
ELSEWHERE = {
    "docs/images.md": "tests/e2e/engines/test_library_guide.py",  # it needs a registry
}
# What stands before a docstring's example there.
DOCSTRINGS = {
    "unionfs/layers/__init__.py": "from unionfs.layers import open_store",
    "unionfs/drivers/contract.py": """
        import io, pathlib
        from unionfs.drivers import default_registry
        driver = default_registry().new("home")
        base_tar, top_tar = (io.BytesIO(pathlib.Path(name).read_bytes()) for name in ("layer.tar", "top.tar"))
    """,
    "unionfs/testing/__init__.py": """
        import my_package.driver
    """,
}

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


def blocks(page: str) -> list[str]:
    """The Python of a page, without what is taken from a file."""
    found = re.findall(r"^```python[^\n]*\n(.*?)^```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)
    return [text for text in found if "--8<--" not in text]


def literal_blocks(path: Path) -> Iterator[str]:
    """What follows a double colon in the docstrings of a module, if it is Python."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            for text in re.findall(r"::\n\n((?: {4}[^\n]*\n|\n)+)", (ast.get_docstring(node) or "") + "\n"):
                try:
                    ast.parse(textwrap.dedent(text))
                except SyntaxError:
                    continue  # a picture
                yield textwrap.dedent(text)


@pytest.fixture
def workplace(tmp_path: Path) -> Iterator[Path]:
    """A directory with the layers and archives that the examples name."""
    os.chmod(tmp_path, 0o755)
    busybox = shutil.which("busybox")
    assert busybox is not None, "busybox is missing; run scripts/setup --dev"
    for name in (
        "debian/bin",
        "debian/etc",
        "app/etc",
        "changes",
        "merged",
        "layers/5/etc",
        "layers/6",
        "layers/7/etc",
        "layers/8",
    ):
        (tmp_path / name).mkdir(parents=True)
    shutil.copy(busybox, tmp_path / "debian/bin/busybox")
    for applet in ("sh", "touch", "cat"):
        (tmp_path / "debian/bin" / applet).symlink_to("busybox")
    for name in ("debian/etc/motd", "debian/etc/issue", "app/etc/app", "layers/5/etc/old", "layers/7/etc/new"):
        (tmp_path / name).write_text(f"{name}\n")
    os.mknod(tmp_path / "layers/7/etc/old", stat.S_IFCHR, 0)  # a whiteout
    (tmp_path / "layer.tar").write_bytes(archive([member("etc/"), member("etc/motd", "hello")]))
    (tmp_path / "top.tar").write_bytes(archive([member("etc/"), member("etc/new", "new")]))
    subprocess.run(["gzip", "-k", "layer.tar"], cwd=tmp_path, check=True)
    shutil.copytree(ROOT / "docs/examples", tmp_path / "docs/examples")
    shutil.copy(ROOT / "docs/examples/copies.py", tmp_path / "copies.py")
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package/__init__.py").touch()
    shutil.copy(ROOT / "docs/examples/copies.py", tmp_path / "my_package/driver.py")
    yield tmp_path
    left = mount_points_below(tmp_path)
    for point in reversed(left):
        take_down(point, servers_of(point))
    assert not left, f"an example leaves something mounted: {left}"


def run(program: str, workplace: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "UNIONFS_ROOT": str(workplace / "root")}
    done = subprocess.run(
        [sys.executable, "-W", "error::ResourceWarning", "-c", program],
        cwd=workplace,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, f"{program}\n{done.stderr}"
    assert "ResourceWarning" not in done.stderr
    # What a comment says that is printed.
    for comment in re.findall(r"print\(.*\) +# (\".*)$", program, re.MULTILINE):
        assert all(text in done.stdout for text in re.findall(r'"([^"]+)"', comment)), f"{comment}\n{done.stdout}"


@pytest.mark.parametrize(("page", "number"), [(page, n) for page in PAGES for n in range(len(blocks(page)))])
def test_an_example_of_a_page(page: str, number: int, workplace: Path) -> None:
    run(blocks(page)[number], workplace)


@pytest.mark.parametrize("module", DOCSTRINGS)
def test_an_example_of_a_docstring(module: str, workplace: Path) -> None:
    examples = list(literal_blocks(ROOT / module))
    assert examples
    for example in examples:
        run(textwrap.dedent(DOCSTRINGS[module]) + "\n" + example, workplace)


def test_no_example_is_left_out() -> None:
    pages = {str(path.relative_to(ROOT)) for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]}
    assert {page for page in pages if blocks(page)} == {*PAGES, *ELSEWHERE}
    # They run as root of this machine: what they write stays in their own directory.
    assert not re.search(r"""["']/(var|tmp|store|home)\b""", "".join(text for page in PAGES for text in blocks(page)))
    modules = {str(path.relative_to(ROOT)) for path in ROOT.glob("unionfs/**/*.py") if any(literal_blocks(path))}
    # Those of modules that are no part of the library say how it is built.
    assert modules == {*DOCSTRINGS, "unionfs/engines/images/__init__.py"}
