"""The comparison with transformers' training step as a Markdown page."""

from __future__ import annotations

from typing import Any


def table(found: dict[str, Any]) -> str:
    """Return the results, as they stand in the JSON file, as Markdown."""
    versions, setting = found["versions"], found["setting"]
    is_cpu = found["device"] == "cpu"
    where = f"{found['machine']}, " + (f"{setting['threads']} thread(s), " if is_cpu else "")
    lines = [
        "# PiKV's training step beside transformers'",
        "",
        f"`benchmarks/peers/transformers_moe.py` on {where}load {found['load_average'][0]:.2f} at the start, commit "
        f"{found['commit'][:12]}{found['commit'][40:]}; PiKV {versions['pikv']}, transformers "
        f"{versions['transformers']}, torch {versions['torch']}.",
        "",
        "Four layers, hidden 256, 4/2 heads of 64, 8 experts of 512, 2 for each token, vocabulary 4,096; "
        f"{setting['samples']} x {setting['context_tokens']} tokens a step. A step is everything from ids to moved "
        f"weights; medians of {setting['steps']} steps in turn, in "
        f"{'CPU time of the process' if is_cpu else 'wall time, synchronised'}. Loss is the cross-entropy before "
        "the first step. Peak memory is that of a process of its own, "
        f"{'beyond its libraries' if is_cpu else 'allocated'}.",
    ]
    for architecture, precisions in found["results"].items():
        lines += [
            "",
            f"## {architecture}",
            "",
            "| precision | contender | ms a step | tokens/s | PiKV is × as fast | loss | peak MiB |",
            "|---" * 7 + "|",
        ]
        for precision, sides in precisions.items():
            ours = next(row["step_ms"] for side, row in sides.items() if side.startswith("pikv"))
            lines += [_row(precision, side, row, ours) for side, row in sides.items()]
    return "\n".join([*lines, "", *_notes(found)]) + "\n"


def _row(precision: str, side: str, row: dict[str, float], ours: float) -> str:
    ratio = "" if side.startswith("pikv") else f"{row['step_ms'] / ours:.2f}"
    cells = [precision, side, f"{row['step_ms']:,.1f}", f"{row['tokens_per_s']:,.0f}", ratio]
    cells += [f"{row['cross_entropy']:.5f}", f"{row['peak_bytes'] / 2**20:,.0f}" if row["peak_bytes"] else ""]
    return "| " + " | ".join(cells) + " |"


def _notes(found: dict[str, Any]) -> list[str]:
    settings = ", ".join(f"{name}={value}" for name, value in found["environment"].items())
    return [
        "- autocast: bfloat16 autocast over float32 weights, transformers' as users run it, PiKV's as its trainer "
        "does. masters: bfloat16 weights, moved by way of float32 copies. grouped_mm and eager: transformers' experts.",
        "- Both sides clip with foreach and step with the fused AdamW, and balance their experts with losses that are "
        "equal at balance.",
        "- compiled: the decoder by torch.compile, whose memory is not told. PiKV's step does without: its "
        "operations break the compiler's graphs.",
        f"- malloc's settings are the system's own for both sides{f', and {settings}' if settings else ''}.",
    ]
