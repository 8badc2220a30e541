"""docs/images.md, each command as it stands there."""

from __future__ import annotations

import json
import os
import re
import textwrap

import pytest

from tests.e2e.engines.private import REPOSITORY, private_cell
from tests.engines.image_archives import Made, to_tar
from tests.layers.archives import files

pytestmark = [pytest.mark.engine, pytest.mark.skipif(os.geteuid() != 0, reason="needs root")]

GUIDE = REPOSITORY / "docs/images.md"


def blocks(language: str) -> list[str]:
    """The blocks of a language, those in lists too."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^\1```", GUIDE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return [textwrap.dedent(text) for _, text in found]


def test_the_guide() -> None:
    made = Made([files(a="one"), files(b="two")], {"config": {"Cmd": ["/bin/sh"]}})
    script = "\n".join(["set -eux -o pipefail", *blocks("sh")])
    assert script.count("unionfs image") > 15
    with private_cell() as cell:
        (cell.root / "app.tar").write_bytes(to_tar(made.old_docker("app:v1")))
        done = cell.run(
            "bash", "-c", script, cwd=cell.root, env={"UNIONFS_ROOT": f"{cell.root}/store", "HOME": f"{cell.root}"}
        )
        said = done.stdout.decode()
        # Imported twice, pulled twice, removed once for each time it was there under its last name.
        assert said.count(f"{made.image_id}\n") >= 4
        assert said.count(f"removed {made.image_id}") == 2
        assert "manifest.json" in said
        assert json.dumps(made.diff_ids[0]) in said
        assert said.endswith("0 things removed, 0 B.\n")
        assert "\n[]\n" in said
        cell.assert_quiet()


def test_the_python_block_names_what_there_is() -> None:
    for block in blocks("python"):
        imports = [line for line in block.splitlines() if line.startswith("from ")]
        assert imports
        exec("\n".join(imports), {})
        compile(block, str(GUIDE), "exec")
