"""What mkdocs.yml needs beside docs/: pages from the repository's root, links to code, and the API reference.

MkDocs calls the functions named `on_...` (https://www.mkdocs.org/user-guide/configuration/#hooks). The reference is
made from the source as text: nothing of this project is imported.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
ROOT_PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "CONTRIBUTING.md", "CHANGELOG.md": "CHANGELOG.md"}
"""Files of the repository's root that are pages, and their places in the site."""
PACKAGES = ("rayrlhf", "actors", "jobs")
LINK = re.compile(r"(!?)\[([^\]]+)\]\(([^)#\s]+)(#[^)\s]*)?\)")
"""A link, or with `!` a picture."""


def reference_pages() -> dict[str, list[str]]:
    """Reference page by its place in the site -> the modules on it: a page a wing, and one for loose modules."""
    pages: dict[str, list[str]] = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            if "assets" in parts or parts[-1] == "__init__":
                continue
            pages.setdefault(f"reference/{'.'.join(parts[:-1])}.md", []).append(".".join(parts))
    return pages


def page_of_notebook(path: Path) -> str:
    """An executed notebook as Markdown: its texts, its code, and behind each cell what it gave."""
    parts = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", ()):
            data = output.get("data", {})
            text = "".join(data.get("text/plain", output.get("text", ())))
            parts.append("".join(data["text/html"]) if "text/html" in data else f"```text\n{text.rstrip()}\n```")
    return "\n\n".join(parts) + "\n"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Append the reference to the navigation."""
    pages = sorted(reference_pages(), key=lambda page: (PACKAGES.index(Path(page).stem.split(".")[0]), Path(page).stem))
    entries: list[Any] = [{Path(page).stem: page} for page in pages]
    config.nav = [*(config.nav or []), {"API reference": entries}]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that do not lie in docs/."""
    for source, place in ROOT_PAGES.items():
        files.append(File.generated(config, place, abs_src_path=str(ROOT / source)))
    for path in sorted((ROOT / "docs").glob("*.ipynb")):
        files.append(File.generated(config, f"{path.stem}.md", content=page_of_notebook(path)))
    for page, modules in reference_pages().items():
        wing = Path(page).stem
        about = f"::: {wing}\n    options: {{show_root_heading: false, show_root_toc_entry: false, members: false}}"
        text = "\n\n".join([f"# `{wing}`", about, *(f"::: {module}" for module in modules)]) + "\n"
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links and pictures of the repository into those of the site: documents are pages, modules the reference."""
    place = page.file.src_uri
    sources = {site: source for source, site in ROOT_PAGES.items()}
    folder = (ROOT / sources.get(place, f"docs/{place}")).parent
    of_module = {module: page for page, modules in reference_pages().items() for module in modules}

    def rewritten(match: re.Match[str]) -> str:
        mark, text, target, anchor = match[1], match[2], match[3], match[4] or ""
        if "://" in target or place.startswith("reference/"):
            return match[0]
        path = Path(os.path.normpath(folder / target)).relative_to(ROOT)
        module = ".".join(path.with_suffix("").parts)
        if module in of_module:
            there, anchor = of_module[module], f"#{module}"
        elif str(path) in ROOT_PAGES:
            there = ROOT_PAGES[str(path)]
        elif path.parts[0] == "docs":
            there = str(path.relative_to("docs")).replace(".ipynb", ".md")
        else:
            return f"{text}"  # a file that has no page, such as NOTICE or the folder monitoring/
        return f"{mark}[{text}]({os.path.relpath(there, Path(place).parent)}{anchor})"

    return LINK.sub(rewritten, markdown)
