"""The documentation site: built strictly, from source as text, without the network."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.tour import CELLS

pytestmark = pytest.mark.timeout(900)  # 10 s of CPU time, on machines that may be busy
ROOT = Path(__file__).parents[2]
LOADED = re.compile(r"""<(?:script|img|iframe|source)\b[^>]*\bsrc="?((?:https?:)?//[^\s">]+)""")
STYLES = re.compile(r"""<link\b[^>]*rel="?(?:stylesheet|preconnect|preload|icon)[^>]*href="?((?:https?:)?//[^\s">]+)""")
NO_NETWORK = """
import socket, sys
def refused(*args, **kwargs): raise OSError("the documentation must build without the network")
socket.socket.connect = refused
socket.getaddrinfo = refused
from mkdocs.__main__ import cli
try:
    cli(["build", "--strict", "--site-dir", sys.argv[1]])
finally:
    heavy = {"torch", "ray", "vllm", "transformers"} & set(sys.modules)
    assert not heavy, f"imported: {heavy}"
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A strict build: a broken link, anchor, cross-reference or docstring section ends it."""
    directory = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [sys.executable, "-c", NO_NETWORK, str(directory)],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    return directory


def test_every_document_is_a_page(site: Path) -> None:
    documents = {path.stem for path in (ROOT / "docs").glob("*.md")} | {"index", "CONTRIBUTING", "CHANGELOG"}
    assert documents <= {path.stem for path in site.glob("*.html")}


def test_the_tour_is_a_page_with_what_its_cells_gave(site: Path) -> None:
    """And its code is that of the script that writes it; tests/e2e/test_tour.py executes it."""
    cells = json.loads((ROOT / "docs" / "tour.ipynb").read_text(encoding="utf-8"))["cells"]
    assert ["".join(cell["source"]) for cell in cells] == [source for _, source in CELLS]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert all(cell["outputs"] and cell["execution_count"] for cell in code)
    page = (site / "tour.html").read_text(encoding="utf-8")
    assert page.count("<table") >= 4 and "model.safetensors" in page


def test_every_module_is_in_the_reference(site: Path) -> None:
    pages = "".join(path.read_text(encoding="utf-8") for path in (site / "reference").glob("*.html"))
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for package in ("rayrlhf", "actors", "jobs")
        for path in (ROOT / package).rglob("*.py")
        if path.name != "__init__.py" and "assets" not in path.parts
    ]
    assert [module for module in modules if f'id="{module}"' not in pages] == []


def test_pages_load_nothing_from_elsewhere(site: Path) -> None:
    """Links may lead to other hosts, but no script, style, font or picture comes from one."""
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert LOADED.findall(text) + STYLES.findall(text) == [], page.name
    for style in site.rglob("*.css"):
        assert not re.search(r"url\(\s*[\"']?(https?:)?//", style.read_text(encoding="utf-8")), style.name
