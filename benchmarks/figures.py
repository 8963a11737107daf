"""Put the newest measured figures into the README and the pages of docs/ that show them.

    python benchmarks/figures.py [--check]

A page says `<!-- figures: SECTION/TABLE -->` where a table belongs, and `<!-- end of figures -->` behind it. What stands
between is made from the newest file of benchmarks/results/ that has the section. --check changes nothing, and fails where a page
differs.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import decode
import kernels
import kernels_gpu
import prefill

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
PLACE = re.compile(r"(<!-- figures: (.+?)/(.+?) -->\n).*?(<!-- end of figures -->)", re.DOTALL)
TABLES: dict[str, Callable[[dict[str, Any]], dict[str, str]]] = {
    "decode": decode.tables,
    "decode on two threads": decode.tables,
    "kernels": kernels.tables,
    "kernels on two threads": kernels.tables,
    "prefill": prefill.tables,
    "kernels on a GPU": kernels_gpu.tables,
}


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    only_check = parser.parse_args(words).check
    stale = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        made = PLACE.sub(lambda place: f"{place[1]}{table(place[2], place[3])}\n{place[4]}", text)
        if made != text:
            stale.append(str(page.relative_to(ROOT)))
            if not only_check:
                page.write_text(made, encoding="utf-8")
    if stale:
        print("differs from benchmarks/results: " if only_check else "written: ", ", ".join(stale), sep="")
    sys.exit(bool(stale and only_check))


def table(section: str, name: str) -> str:
    """Return a table of the newest results that have the section, and where they come from."""
    files = sorted((ROOT / "benchmarks" / "results").glob("*-????-??-??.json"), key=lambda file: file.stem[-10:])
    for file in reversed(files):
        found = json.loads(file.read_text(encoding="utf-8"))
        if section in found:
            return f"{TABLES[section](found[section])[name]}\n\n{found['machine']}, {found['date']} ([all figures]({link(file)}))."
    raise SystemExit(f"no results have '{section}': run benchmarks/bench.py")
