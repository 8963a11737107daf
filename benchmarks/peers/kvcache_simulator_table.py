"""The comparison with kvcache-simulator as a Markdown page."""

from __future__ import annotations

from typing import Any

SHOWN = 12  # capacities of a policy, of the many that are compared


def table(found: dict[str, Any]) -> str:
    """Return the results, as they stand in the JSON file, as Markdown."""
    theirs, ours, longest = found["kvcache-simulator"], found["pikv"], found["longest_request_blocks"]
    lines = [
        "# PiKV beside kvcache-simulator",
        "",
        f"`benchmarks/peers/kvcache_simulator.py` on {found['machine']}, one thread, load "
        f"{found['load_average'][0]:.2f} at the start, commit {found['commit'][:12]}{found['commit'][40:]}; "
        f"kvcache-simulator {theirs['kvcache-simulator']} with its C++ core, PiKV {ours['pikv']} with numba "
        f"{ours['numba']}, both Python {ours['python']}.",
        "",
        f"A trace of {found['num_requests']:,} requests, {found['num_accesses']:,} accesses to {found['num_blocks']:,} "
        f"blocks of 512 tokens; the longest request has {longest} blocks. Prefix hits in tokens, of the second half of "
        "the requests; capacities that the first half does not fill are left out, as kvcache-simulator does.",
        "",
        "| policy | capacities | equal above the longest request | equal up to it |",
        "|---" * 4 + "|",
        *(_agreement(found, policy) for policy in ("lru", "fifo")),
        "",
        "| capacity (blocks) | its lru | lru | its fifo | fifo | its optimal | belady-leaf |",
        "|---" * 7 + "|",
        *_hits(found),
        "",
        f"| CPU seconds (seconds), median of {found['rounds']} | kvcache-simulator | PiKV | × |",
        "|---" * 4 + "|",
        *_times(found),
        "",
        "- Of a request larger than the cache PiKV evicts the tail and kvcache-simulator stops inserting: the same "
        "blocks stay.",
        "- fifo is touched forward here, as in kvcache-simulator. Its optimal may leave a block out of the cache and "
        "knows the next request, belady-leaf takes every block in: they are not the same policy.",
        "- Warm is the second run, cold the first with nothing compiled: kvcache-simulator compiles its C++ core, PiKV "
        "the one loop it runs. Both parse the trace every time.",
    ]
    return "\n".join(lines) + "\n"


def _agreement(found: dict[str, Any], policy: str) -> str:
    rows = [row for row in found["hits"] if row["policy"] == policy]
    longest = found["longest_request_blocks"]

    def equal(chosen: list[dict[str, Any]]) -> str:
        return f"{sum(row['kvcache-simulator'] == row['pikv'] for row in chosen)} of {len(chosen)}"

    above = [row for row in rows if row["capacity_blocks"] > longest]
    below = [row for row in rows if row["capacity_blocks"] <= longest]
    return f"| {policy} | {len(rows)} | {equal(above)} | {equal(below)} |"


def _hits(found: dict[str, Any]) -> list[str]:
    by_capacity: dict[int, list[int]] = {}
    for row in found["hits"]:
        by_capacity.setdefault(row["capacity_blocks"], []).extend([row["kvcache-simulator"], row["pikv"]])
    whole = [(capacity, tokens) for capacity, tokens in by_capacity.items() if len(tokens) == 6]
    step = max(1, len(whole) // SHOWN)
    return [
        f"| {capacity:,} | " + " | ".join(f"{count:,}" for count in tokens) + " |" for capacity, tokens in whole[::step]
    ]


def _times(found: dict[str, Any]) -> list[str]:
    replayed, command = found["replay"], found["command_line"]
    rows = [
        ("reading the trace", replayed["read"]),
        ("replaying lru at 5 capacities", replayed["replay"]),
        ("command line, warm", command["warm"]),
        ("command line, cold", command["cold"]),
    ]
    lines = []
    for label, sides in rows:
        theirs, ours = sides["kvcache-simulator"], sides["pikv"]
        ratio = theirs["median_cpu_s"] / ours["median_cpu_s"]
        lines.append(f"| {label} | {_seconds(theirs)} | {_seconds(ours)} | {ratio:.1f} |")
    lines.append(f"| lru at every capacity in one pass | | {_seconds(replayed['curve']['pikv'])} | |")
    return lines


def _seconds(times: dict[str, Any]) -> str:
    return f"{times['median_cpu_s']:.3f}" + (f" ({times['median_s']:.2f})" if "median_s" in times else "")
