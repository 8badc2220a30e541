"""A database of 90 MB in a lower layer, as rpm's is one, that a build rewrites: not a row of it may be damaged."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.fuse_ops.test_mount_userns import in_userns, owned, user
from tests.support import database
from tests.support.sandbox import Sandbox, needs_root

pytest_plugins = ["tests.support.sandbox"]
needs_root()

__all__ = ["user"]  # a fixture


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("database") / "packages.db"
    database.make(str(path))
    return path


def test_rewriting_a_large_database(box: Sandbox, packages: Path) -> None:
    shutil.copy(packages, box.lower().dir("var").at("var/packages.db"))
    with box.mount():
        for step in ("rewrite", "check"):
            database.run_all([[step, box.at("var/packages.db")]])
    with box.mount():
        database.check(box.at("var/packages.db"))
    database.check(box.in_upper("var/packages.db"))  # as the next layer has it


def test_rewriting_a_large_database_as_an_ordinary_user(box: Sandbox, packages: Path, user: str) -> None:
    shutil.copy(packages, box.lower().dir("var").at("var/packages.db"))
    owned(box, user)
    answer = in_userns(
        user,
        box,
        """
        from tests.support import database
        mount()
        for step in ("rewrite", "check"):
            database.run_all([[step, at("var/packages.db")]])
        unmount()
        mount()
        database.check(at("var/packages.db"))
        unmount()
        result["done"] = True
        """,
    )
    assert answer == {"done": True}
    database.check(box.in_upper("var/packages.db"))
