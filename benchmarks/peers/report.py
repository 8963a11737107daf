"""The comparison with kvpress as a Markdown table, with the machine and the commit it was measured on."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from agreement import Agreement


def machine() -> str:
    """Return the processor, its cores and the system."""
    models = [line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return f"{models[0] if models else platform.processor()}, {os.cpu_count()} cores, {platform.system()}"


def _lines(path: str) -> list[str]:
    return Path(path).read_text(encoding="utf-8").splitlines() if Path(path).exists() else []


def commit() -> str:
    """Return the commit that is measured, and whether anything of it was changed."""

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", Path(__file__).parent, *words], check=True, capture_output=True, text=True
        ).stdout.strip()

    changed = git("status", "--porcelain", "--", ":/pikv_core", ":/kernels", ":/benchmarks/peers")
    return git("rev-parse", "HEAD") + (" with changes" if changed else "")


def table(
    setting: dict[str, Any],
    ran_on: dict[str, Any],
    full: dict[str, Any],
    rows: dict[str, Any],
    agreements: dict[str, Agreement],
    timed: list[int],
) -> str:
    """Return the results as Markdown; every cell with two numbers is kvpress / PiKV."""
    sides = ("kvpress", "pikv")

    def both(row: dict[str, Any], form: str, *keys: str) -> str:
        return " / ".join(form.format(_at(row[side], keys) / _at(full[side], keys)) for side in sides)

    model, lengths = setting["model"], setting["context_tokens"]
    overheads = "".join(f" prefill × ({length:,}) |" for length in timed)
    lines = [
        "# PiKV beside kvpress",
        "",
        f"`benchmarks/peers/kvpress.py` on {ran_on['machine']}, one thread, float32, commit {ran_on['commit'][:12]}"
        f"{ran_on['commit'][40:]}; kvpress {ran_on['kvpress']['kvpress']} with transformers "
        f"{ran_on['kvpress']['transformers']}, PiKV {ran_on['pikv']['pikv']} with transformers "
        f"{ran_on['pikv']['transformers']}, both torch {ran_on['pikv']['torch']}.",
        "",
        f"A {model['model_type']} of {model['num_hidden_layers']} layers, hidden {model['hidden_size']}, "
        f"{model['num_attention_heads']}/{model['num_key_value_heads']} heads of {model['head_dim']}; contexts of "
        f"{lengths[0]:,} to {lengths[-1]:,} tokens, {setting['num_queries']:,} questions asked after compressing; full "
        + "cache: "
        + " / ".join(f"recall {full[side]['recall']:.4f}" for side in sides)
        + ". Two numbers are kvpress / PiKV.",
        "",
        f"| method | share | same tokens kept | ties | other | recall | bytes / full |{overheads}",
        "|---" * (7 + len(timed)) + "|",
    ]
    for label, row in rows.items():
        agreement, (name, share) = agreements[label], label.split(" at ")
        equal = f"{agreement.share:.4%} of {agreement.num_kept:,}"
        recall = " / ".join(f"{row[side]['recall']:.4f}" for side in sides)
        times = "".join(f" {both(row, '{:.2f}', 'prefill_ms', str(length))} |" for length in timed)
        lines.append(
            f"| {name} | {share} | {equal} | {agreement.num_ties} | {agreement.num_other} | {recall} "
            f"| {both(row, '{:.3f}', 'bytes')} |{times}"
        )
    return "\n".join(lines) + "\n"


def _at(tree: Any, keys: tuple[str, ...]) -> float:
    for key in keys:
        tree = tree[key]
    return tree
