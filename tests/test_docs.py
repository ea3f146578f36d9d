"""The pages in docs/ and the README: every Python block runs, page by page, and every link and picture exists. Some
import torchvision."""

import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

import densenet_fast

ROOT = Path(densenet_fast.__file__).parents[1]
PAGES = [
    *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "SECURITY", "CHANGELOG")),
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "benchmarks/README.md",
]
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```[ ]*$", re.MULTILINE | re.DOTALL)
NOT_RUN = re.compile(r"<!--\s*not run:(.*?)-->\s*\Z", re.DOTALL)


class Block(NamedTuple):
    """A fenced block: its language, its text, its first line's number, and why it is not run, None if it is."""

    language: str
    text: str
    line: int
    reason: str | None


def blocks(page: str) -> list[Block]:
    found = []
    for match in FENCE.finditer(page):
        mark = NOT_RUN.search(page[: match.start()])
        line = page[: match.start()].count("\n") + 2
        found.append(Block(match[1], match[2], line, None if mark is None else " ".join(mark[1].split())))
    return found


def run(page: Path, namespace: dict) -> int:
    """Runs the page's Python blocks in one namespace; how many ran."""
    count = 0
    for block in blocks(page.read_text()):
        if block.language == "python" and block.reason is None:
            code = "\n" * (block.line - 1) + block.text
            exec(compile(code, str(page), "exec"), namespace)
            count += 1
    return count


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_run(page, tmp_path, monkeypatch):
    import torch

    monkeypatch.chdir(tmp_path)
    torch.use_deterministic_algorithms(False)
    run(page, {"__name__": "__main__"})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_blocks_that_are_not_run_say_why(page):
    text = page.read_text()
    marked = [block for block in blocks(text) if block.reason is not None]
    assert len(marked) == len(re.findall(r"<!--\s*not run", text)), "a mark without a block right behind it"
    for block in marked:
        assert block.language == "python", f"{page.name}:{block.line}: only Python blocks are run"
        assert len(block.reason.split()) >= 2, f"{page.name}:{block.line}: expected a reason, got {block.reason!r}"
        compile(block.text, f"{page.name}:{block.line}", "exec")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_pictures_exist(page):
    text = FENCE.sub("", page.read_text())
    headings = {anchor(line.lstrip("# ")) for line in text.splitlines() if line.startswith("#")}
    for target in re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|srcset|href)="([^"]+)"', text):
        if target.startswith("#"):
            assert target[1:] in headings, f"{page.name}: {target}"
        elif not target.startswith(("http://", "https://", "mailto:")):
            assert (page.parent / target.split("#")[0]).exists(), f"{page.name}: {target}"


def anchor(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


def test_pages_are_short():
    for page in PAGES:
        assert len(page.read_text().splitlines()) <= 200, page.name


@pytest.mark.parametrize(
    "page, error",
    [
        ("```python\nx = 1\n```\ntext\n```python\nassert x == 2\n```\n", AssertionError),
        ("```python\nfrom densenet_fast import nothing\n```\n", ImportError),
        ("<!-- not run: needs a GPU -->\n```python\n1 / 0\n```\n```python\nz\n```\n", NameError),
    ],
)
def test_a_wrong_block_is_found(page, error, tmp_path):
    path = tmp_path / "page.md"
    path.write_text(page)
    with pytest.raises(error):
        run(path, {})


def test_drawings_are_current_and_legible_in_light_and_dark(tmp_path):
    """What docs/draw.py draws is what is committed; each drawing has colours for both schemes and names its content."""
    drawn = subprocess.run([sys.executable, str(ROOT / "docs/draw.py"), str(tmp_path)], capture_output=True, text=True)
    assert drawn.returncode == 0, drawn.stderr
    files = sorted(tmp_path.glob("*.svg"))
    assert files
    for file in files:
        text = file.read_text()
        assert text == (ROOT / "docs" / file.name).read_text(), f"docs/{file.name}: run docs/draw.py"
        assert "prefers-color-scheme: dark" in text and "<title>" in text and 'role="img"' in text


def test_every_variable_stands_in_its_table():
    """The names that begin as ours do, in all sources, are those in the tables of docs/environment.md."""
    ours = re.compile(r"\bDENSENET_FAST_[A-Z]+(?:_[A-Z]+)*\b")
    suffixes = {".py", ".h", ".cpp", ".cu", ".toml", ".yml"}
    sources = [ROOT / "setup.py", ROOT / "Makefile", ROOT / "pyproject.toml"]
    for folder in ("densenet_fast", "csrc", "tests", "benchmarks", "examples"):
        sources += [path for path in (ROOT / folder).rglob("*") if path.suffix in suffixes]
    found = {name for path in sources for name in ours.findall(path.read_text())}
    page = (ROOT / "docs/environment.md").read_text()
    tables = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    assert found == {name for cell in tables for name in ours.findall(cell)}


def test_every_page_stands_in_the_index():
    index = (ROOT / "docs/README.md").read_text()
    listed = re.findall(r"\]\(([\w-]+\.md)\)", index)
    assert sorted(listed) == sorted(path.name for path in (ROOT / "docs").glob("*.md") if path.name != "README.md")
