"""What mkdocs does not do by itself: pages that lie beside docs/, and links to files that are no pages."""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

_REPOSITORY = Path(__file__).resolve().parent.parent.parent
_LINK = re.compile(r"\[([^\]]*)\]\(([^)#:]+)(#[^)]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the documents of the repository's root; README.md is the first page."""
    for path in sorted(_REPOSITORY.glob("*.md")):
        name = "index.md" if path.name == "README.md" else path.name
        files.append(File.generated(config, name, content=path.read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Have links lead to where the pages are on the site; what is no page is named without one."""
    here = posixpath.dirname(page.file.src_uri)
    # Where the text lies in the repository.
    origin = "" if page.file.generated_by else posixpath.join("docs", here)

    def moved(match: re.Match[str]) -> str:
        text, target, anchor = match[1], match[2], match[3] or ""
        path = posixpath.normpath(posixpath.join(origin, target))
        uri = "index.md" if path == "README.md" else path.removeprefix("docs/")
        if files.get_file_from_path(uri) is None:
            return text if os.path.exists(_REPOSITORY / path) else match[0]
        return f"[{text}]({posixpath.relpath(uri, here or '.')}{anchor})"

    return _LINK.sub(moved, markdown)
