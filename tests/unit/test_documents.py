"""Documents: their links lead somewhere, and those that promise to be short are."""

from __future__ import annotations

import re

import pytest

from tests.engine_process import ROOT
from tests.model.following import apply_diffs, copy_tree

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
PAGES = [
    path for pattern in ("*.md", "docs/**/*.md", ".github/**/*.md") for path in sorted(ROOT.glob(pattern))
]  # fmt: skip


def anchors_of(text: str) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_leads_to_a_file_and_to_a_heading_of_it(page) -> None:
    for link in LINK.findall(page.read_text()):
        if re.match(r"[a-z]+:", link):
            continue
        target, _, anchor = link.partition("#")
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), link
        assert not anchor or anchor in anchors_of(path.read_text()), link


@pytest.mark.parametrize(
    "page", [page for page in PAGES if "```diff\n" in page.read_text()], ids=lambda page: page.name
)
def test_every_diff_applies_to_the_tree(page, tmp_path) -> None:
    """Tests of the model tier run what they give: this one says at once that the lines around a change moved."""
    copy_tree(tmp_path, "engine", "tests")
    apply_diffs(page.name, tmp_path)


def test_the_figures_are_one_page() -> None:
    assert len((ROOT / "docs/performance.md").read_text().splitlines()) <= 80


def test_no_docstring_opens_with_a_clause_in_place_of_a_sentence() -> None:
    opening = re.compile(r'"""(What|Of|How|Behind|As|Also|Where|When|Whatever|So|Like|With)\b.*')
    sources = [path for root in ("engine", "operator", "tests") for path in (ROOT / root).rglob("*.py")]
    assert [f"{path}: {found.group()}" for path in sources for found in opening.finditer(path.read_text())] == []
