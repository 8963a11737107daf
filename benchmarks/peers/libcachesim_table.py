"""The comparison with libCacheSim as a Markdown page."""

from __future__ import annotations

from typing import Any


def table(found: dict[str, Any]) -> str:
    """Return the results, as they stand in the JSON file, as Markdown."""
    theirs, ours = found["libcachesim"], found["pikv"]
    lines = [
        "# PiKV beside libCacheSim",
        "",
        f"`benchmarks/peers/libcachesim.py` on {found['machine']}, one thread, load "
        f"{found['load_average'][0]:.2f} at the start, commit {found['commit'][:12]}{found['commit'][40:]}; "
        f"libCacheSim's Python binding {theirs['libcachesim']}, PiKV {ours['pikv']} with numba {ours['numba']}, "
        f"both Python {ours['python']}.",
        "",
        "Hits are object hits. M/s are millions of accesses per second of CPU time, medians of "
        f"{found['rounds']} rounds in which the sides alternate: libCacheSim's `process_trace` over a memory-mapped "
        "oracleGeneral file with its default hash table and with the best of four smaller ones (2 to the power of "
        "14, 16, 18, 20), PiKV's replay over dense ids in memory, compiled before.",
    ]
    for name, trace in found["traces"].items():
        lines += [
            "",
            f"## {name}: {trace['num_accesses']:,} accesses, {trace['num_blocks']:,} blocks",
            "",
            "| policy | capacity (blocks) | hits libCacheSim | hits PiKV | libCacheSim M/s | tuned | PiKV M/s | × | "
            "× tuned |",
            "|---" * 9 + "|",
            *(_row(row) for row in trace["rows"]),
        ]
    return "\n".join([*lines, "", *_sweep(found), "", *_notes()]) + "\n"


def _row(row: dict[str, Any]) -> str:
    hits, rate = row["hits"], {side: value / 1e6 for side, value in row["accesses_per_s"].items()}
    same = "equal" if hits["pikv"] == hits["libcachesim"] else f"{hits['pikv']:,}"
    cells = [row["policy"], f"{row['capacity_blocks']:,}", f"{hits['libcachesim']:,}", same]
    cells += [f"{rate[side]:.1f}" for side in ("libcachesim", "libcachesim_tuned", "pikv")]
    cells += [f"{rate['pikv'] / rate[side]:.1f}" for side in ("libcachesim", "libcachesim_tuned")]
    return "| " + " | ".join(cells) + " |"


def _sweep(found: dict[str, Any]) -> list[str]:
    lines = [
        f"## Reading the file and replaying {', '.join(found['sweep'][0]['policies'])}",
        "",
        "| capacity (blocks) | libCacheSim CPU s | tuned | PiKV CPU s | × | × tuned |",
        "|---" * 6 + "|",
    ]
    for row in found["sweep"]:
        seconds = row["median_s"]
        cells = [f"{row['capacity_blocks']:,}"]
        cells += [f"{seconds[side]:.2f}" for side in ("libcachesim", "libcachesim_tuned", "pikv")]
        cells += [f"{seconds[side] / seconds['pikv']:.1f}" for side in ("libcachesim", "libcachesim_tuned")]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _notes() -> list[str]:
    return [
        "- lru, fifo, lfu, sieve and belady are defined alike on both sides and their hits have to be equal; the "
        "others have variants.",
        "- By default libCacheSim's table has 2 to the power of 24 buckets, whose memory a short run pays for: on the "
        "smaller trace that is most of its time.",
        "- The sweep charges PiKV once with reading, numbering the objects and finding next accesses; libCacheSim "
        "reads its mapped file in every run, next accesses included. Tuned are the tables that the rows above found.",
    ]
