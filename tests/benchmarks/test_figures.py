"""The figures that pages show are those in benchmarks/results/."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def figures(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import figures

    yield figures
    for name in ("figures", "decode", "kernels_cpu", "prefill", "timing"):
        sys.modules.pop(name, None)


def test_pages_show_what_was_measured(figures):
    shown = [page for page in figures.PAGES if figures.PLACE.search(page.read_text(encoding="utf-8"))]
    assert {"README.md", "performance.md"} <= {page.name for page in shown}
    for page in shown:
        text = page.read_text(encoding="utf-8")
        assert figures.filled(text, page) == text, "run `python benchmarks/figures.py`"
        assert text.count("<!-- figures:") == len(figures.PLACE.findall(text)) == text.count("<!-- end of figures -->")


def test_another_figure_is_noticed(figures):
    page = ROOT / "README.md"
    text = page.read_text(encoding="utf-8")
    row = next(line for line in text.splitlines() if line.startswith("| int8 |"))
    assert figures.filled(text.replace(row, row.replace("MiB", "GiB")), page) == text
