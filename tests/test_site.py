"""Every relative link in a Markdown file is valid, and `make docs` fails on a broken link. No test needs a network.

Anchors follow GitHub's rule: lower case, hyphens for spaces, no punctuation; repeated headings get -1, -2, ...
"""

import itertools
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *sorted(page for folder in ("benchmarks", "docs", "tests/data") for page in (ROOT / folder).rglob("*.md")),
]
MKDOCS = ROOT / ".venv" / "mkdocs"

FENCE = re.compile(r"^ *(```|~~~).*?^ *\1 *$", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"(`+)(?!`).*?(?<!`)\1(?!`)", re.DOTALL)
COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
HEADING = re.compile(r"^#{1,6} +(.*?)(?: +#+)? *$", re.MULTILINE)
LINK = re.compile(
    r"""\]\(\s*<?([^)\s>]+)>?(?:\s+"[^"]*")?\s*\) | ^\ *\[[^\]]+\]:\s+<?([^\s>]+) | \b(?:href|src)="([^"]+)\"""",
    re.MULTILINE | re.VERBOSE,
)


def _anchors(page: Path) -> set[str]:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    found, seen = set(re.findall(r'<a (?:id|name)="([^"]+)"', text)), Counter[str]()
    for heading in HEADING.findall(text):
        shown = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", shown.lower()).replace(" ", "-")
        found.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
        seen[slug] += 1
    return found


def _broken_links(page: Path, root: Path) -> Iterator[str]:
    text = CODE.sub("", FENCE.sub("", COMMENT.sub("", page.read_text(encoding="utf-8"))))
    for link in filter(None, (match for matches in LINK.findall(text) for match in matches)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if path.startswith("/") or not target.is_relative_to(root) or not target.exists():
            yield f"{link}: no such file"
        elif anchor and (target.suffix != ".md" or anchor not in _anchors(target)):
            yield f"{link}: no such heading"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_are_valid(page: Path) -> None:
    assert not list(_broken_links(page, ROOT))


def test_broken_links_are_found(tmp_path: Path) -> None:
    page, other = tmp_path / "docs" / "page.md", tmp_path / "other.md"
    page.parent.mkdir()
    other.write_text("# Twice\n```sh\n# no heading\n```\n## `Twice`\n")
    good = [
        "../other.md",
        "../other.md#twice",
        "../other.md#twice-1",
        "#over--under_it",
        "https://example.com/x#y",
        ".",
    ]
    bad = ["missing.md", "../missing.md#twice", "../other.md#no-heading", "#no-such", "/other.md", "../../outside.md"]
    links = [f"[`text`]({link})" for link in [*good, *bad]]
    html = '<img src="missing.png">\n\n[![figure](missing2.png)](../other.md)\n[here]: missing3.md\n'
    page.write_text(
        "# Over & under_it\n" + "\n".join(links) + "\n`[code](missing.md)` <!-- [x](missing.md) -->\n" + html
    )
    found = [line.split(": ")[0] for line in _broken_links(page, tmp_path)]
    assert found == [*bad, "missing.png", "missing2.png", "missing3.md"]


def _rendered_differently(page: Path) -> Iterator[str]:
    """Lines that MkDocs and GitHub render differently."""
    lines = FENCE.sub("", page.read_text(encoding="utf-8")).splitlines()
    for before, line in itertools.pairwise(lines):
        if re.match(r" {1,3}([-*]|\d+\.) ", line):
            yield f"{line}: indent an inner list by 4 spaces"
        elif re.match(r"([-*]|1\.|\|) ", line) and before and not re.match(r"[-*|#<]|\d+\. | ", before):
            yield f"{line}: a list or table needs an empty line before"


def test_pages_render_alike_on_github_and_on_the_site(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("text\n- list\n  - inner\n\n- list\n    - inner\n\ntext\n| table |\n|---|\n| cell |\n")
    assert [line.split(":")[0] for line in _rendered_differently(page)] == ["- list", "  - inner", "| table |"]
    for page in sorted((ROOT / "docs").rglob("*.md")):
        assert not list(_rendered_differently(page)), page


def _build(project: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict"],
        cwd=project,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(MKDOCS), "NO_MKDOCS_2_WARNING": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """The project with a copy of docs/ that a test can change."""
    if not MKDOCS.exists():
        pytest.skip(f"needs {MKDOCS.relative_to(ROOT)}: make docs installs it")
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    for name in ("emo_megatron", "benchmarks", "examples", "README.md"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


def test_the_site_links_into_the_repository_and_fetches_nothing(project: Path) -> None:
    page = project / "docs" / "ops.md"
    links = "[out](../README.md#results) [folder](../benchmarks/) [heading](#over--under_it)"
    page.write_text(f"{page.read_text()}\n## Over & under_it\n\n{links}\n")
    done = _build(project, DOCS_REPO_URL="https://example.com/project/")
    assert done.returncode == 0, done.stderr
    site = project / "build" / "site"
    html = (site / "ops.html").read_text()
    assert 'href="https://example.com/project/blob/HEAD/README.md#results"' in html
    assert 'href="https://example.com/project/blob/HEAD/benchmarks"' in html
    assert 'id="emo_megatron.config.PoolConfig.pool_min"' in (site / "api.html").read_text()
    assert not list(site.rglob("*.py"))
    for built in site.glob("*.html"):
        assert not re.search(r"<(?:link|script|img|iframe)[^>]+(?:href|src)=\"?(?:https?:)?//", built.read_text())


def test_a_broken_link_stops_the_build(project: Path) -> None:
    page = project / "docs" / "ops.md"
    links = ["missing.md", "../missing.md", "dispatch.md#no-such", "#no-such", "/README.md"]
    page.write_text(page.read_text() + "".join(f"\n[text]({link})" for link in [*links, "../README.md"]))
    done = _build(project)
    assert done.returncode != 0
    assert "strict mode" in done.stdout
    for link in links:
        assert f"'{link}'" in done.stderr, done.stderr
    assert "'../README.md'" not in done.stderr
