"""Pages that are made of files of the repository, so that nothing is written twice, and links between them."""

import posixpath
import re
from functools import cache
from pathlib import Path

import gallery
from methods import methods
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from lit_distill.cli import SHORT_HELP, answer_at_once

ROOT = Path(__file__).parents[2]

COPIES = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "benchmarks/README.md": "benchmarks.md"}
"""Files outside of ``docs`` that are pages."""


def on_config(config: MkDocsConfig) -> None:
    """Put a page for each overlay and each notebook under the entry of that name in the navigation."""
    made = {
        "Methods": [{method.name: f"methods/{method.name}.md"} for method in methods(ROOT)],
        "Notebooks": [f"notebooks/{path.stem}.md" for path in notebooks()],
    }
    config.nav = [
        {title: [*entries, *made.pop(title, [])] if isinstance(entries, list) else entries}
        for entry in config.nav or []
        for title, entries in entry.items()
    ]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made."""
    for name, text in made_pages().items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links at pages, and end a command's page with its help."""
    folder, name = posixpath.split(page.file.src_uri)
    if folder == "commands" and (command := name.removesuffix(".md")) in SHORT_HELP:
        markdown += f"\n## Help\n\n```text\n{answer_at_once([command, '--help'])}\n```\n"
    source = {page: source for source, page in sources().items()}.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    return relinked(markdown, source, page.file.src_uri)


def notebooks() -> list[Path]:
    """The notebooks, in their order."""
    return sorted((ROOT / "notebooks").glob("*.ipynb"))


@cache
def sources() -> dict[str, str]:
    """The files outside of ``docs``, as paths in the repository, with their pages."""
    overlays = {f"configs/method/{method.name}.yaml": f"methods/{method.name}.md" for method in methods(ROOT)}
    return COPIES | {f"notebooks/{path.name}": f"notebooks/{path.stem}.md" for path in notebooks()} | overlays


def made_pages() -> dict[str, str]:
    """The pages that are made, and their drawings."""
    made = {page: (ROOT / source).read_text(encoding="utf-8") for source, page in COPIES.items()}
    made |= {f"notebooks/{path.stem}.md": gallery.page(path) for path in notebooks()}
    for method in methods(ROOT):
        made |= {f"methods/{method.name}.md": method.page(), f"methods/{method.name}.svg": method.drawing()}
    return made


def relinked(markdown: str, source: str, page: str) -> str:
    """Links that are right from a file of the repository, as links from the page made of it."""
    pages = sources()

    def link(match: re.Match[str]) -> str:
        target, mark, part = match[1].partition("#")
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        found = pages.get(path, path.removeprefix("docs/") if path.startswith("docs/") else None)
        if not target or "://" in target or found is None:
            return match[0]
        return f"]({posixpath.relpath(found, posixpath.dirname(page) or '.')}{mark}{part})"

    return re.sub(r"\]\(([^)\s]+)\)", link, markdown)
