"""Put the newest measured figures into the README and the pages of docs/ that show them.

    python benchmarks/figures.py [--check]

A page says `<!-- figures: SECTION/TABLE -->` where a table belongs, and `<!-- end of figures -->` behind it. What
stands between is made from the newest file of benchmarks/results/ that has the section. --check changes nothing, and
fails where a page differs.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import decode
import kernels_cpu
import prefill
from timing import table

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
PLACE = re.compile(r"(<!-- figures: (.+?)/(.+?) -->\n).*?(<!-- end of figures -->)", re.DOTALL)


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    only_check = parser.parse_args(words).check
    changed = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        made = filled(text, page)
        if made != text:
            changed.append(str(page.relative_to(ROOT)))
            if not only_check:
                page.write_text(made, encoding="utf-8")
    if changed:
        print("other figures than those in benchmarks/results: " if only_check else "written: ", ", ".join(changed))
    sys.exit(bool(changed and only_check))


def filled(text: str, page: Path) -> str:
    """Return a page's text with the newest tables in their places."""
    return PLACE.sub(lambda place: f"{place[1]}{figures(place[2], place[3], page)}\n{place[4]}", text)


def figures(section: str, name: str, page: Path) -> str:
    """Return a table of the newest results that have the section, and a line that says where they are from."""
    files = sorted(RESULTS.glob("*-????-??-??.json"), key=lambda file: file.stem[-10:], reverse=True)
    for file in files:
        found = json.loads(file.read_text(encoding="utf-8"))
        if section in found:
            link = Path(os.path.relpath(file, page.parent)).as_posix()
            source = f"{found['machine']}, {found['date']} ([results]({link}))."
            return f"{TABLES[section](found[section])[name]}\n\n{source}"
    raise SystemExit(f"no results have '{section}': run benchmarks/bench.py")


def gpu_tables(found: dict[str, Any]) -> dict[str, str]:
    """Return the tables of what `kernels_gpu.py` found."""
    rows = []
    for row in found["times"]:
        wanted = "" if row["target_us"] is None else f"{row['target_us']:,}"
        ratios = ("" if row[f"times SDPA {how}"] is None else f"{row[f'times SDPA {how}']:.2f}" for how in PEERS)
        speed = row["bytes"] / row["us"] / 1e6
        rows.append(f"| {row['op']} | {row['us']:,.0f} | {wanted} | {speed:.2f} | {' | '.join(ratios)} |")
    head = "| operation | µs | wanted | TB/s | × SDPA folded | × SDPA with enable_gqa |"
    return {"kernels": table(head, rows)}


PEERS = ("folded", "enable_gqa")
TABLES: dict[str, Callable[[dict[str, Any]], dict[str, str]]] = {
    "decode": decode.tables,
    "decode on two threads": decode.tables,
    "kernels": kernels_cpu.tables,
    "kernels on two threads": kernels_cpu.tables,
    "prefill": prefill.tables,
    "kernels on a GPU": gpu_tables,
}

if __name__ == "__main__":
    main()
