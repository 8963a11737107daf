"""The comparison with kvpress as a Markdown table, with the machine and the commit it was measured on."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any


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


def table(found: dict[str, Any]) -> str:
    """Return the results, as they stand in the JSON file, as Markdown."""
    setting, full = found["setting"], found["full"]
    model, lengths, timed = setting["model"], setting["context_tokens"], setting["timed_tokens"]
    theirs, ours = found["kvpress"], found["pikv"]
    head = ["method", "share", "same tokens kept", "ties", "other", "recall", "bytes / full"]
    head += [f"prefill × ({length:,})" for length in timed]
    lines = [
        "# PiKV beside kvpress",
        "",
        f"`benchmarks/peers/kvpress.py` on {found['machine']}, one thread, float32, commit {found['commit'][:12]}"
        f"{found['commit'][40:]}; kvpress {theirs['kvpress']} with transformers {theirs['transformers']}, "
        f"PiKV {ours['pikv']} with transformers {ours['transformers']}, both torch {ours['torch']}.",
        "",
        f"A {model['model_type']} of {model['num_hidden_layers']} layers, hidden {model['hidden_size']}, "
        f"{model['num_attention_heads']}/{model['num_key_value_heads']} heads of {model['head_dim']}; contexts of "
        f"{lengths[0]:,} to {lengths[-1]:,} tokens, {setting['num_queries']:,} questions asked after compressing; "
        f"recall of the full cache {_both(full, 'recall', '{:.4f}')}. Two numbers are kvpress / PiKV.",
        "",
        "| " + " | ".join(head) + " |",
        "|---" * len(head) + "|",
    ]
    for label, row in found["results"].items():
        agreement, cells = row["agreement"], label.split(" at ")
        cells += [f"{agreement['share']:.4%} of {agreement['num_kept']:,}"]
        cells += [f"{agreement['num_ties']:,}", f"{agreement['num_other']:,}"]
        cells += [_both(row, "recall", "{:.4f}"), _both(_ratios(row, full, "bytes"), "bytes", "{:.3f}")]
        cells += [_both(_ratios(row, full, "prefill_ms", str(length)), "prefill_ms", "{:.2f}") for length in timed]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *_notes(found)]) + "\n"


def _notes(found: dict[str, Any]) -> list[str]:
    setting, full = found["setting"], found["full"]
    plain = ", ".join(
        f"{_both(_ratios(full, None, 'prefill_ms', str(length)), 'prefill_ms', '{:.0f}')} ms at {length:,} tokens"
        for length in setting["timed_tokens"]
    )
    num_prompts, tie, rounds = setting["num_compared_prompts"], setting["tie"], setting["rounds"]
    return [
        f"- Kept tokens are compared on {num_prompts} prompts, in every layer and key/value head. A tie is a token "
        f"whose score is within {tie:g} (relative) of the last kept one's; other is what no tie explains.",
        "- Options are the same on both sides. Two are not both sides' defaults: expected-attention's epsilon is 0.01 "
        "(kvpress: 0), and the pyramid has the form that kvpress gives it (PiKV: PyramidKV's own).",
        "- Bytes are those of the live tensors; PiKV holds each token's position, and where it has one its score, too.",
        f"- Prefill is the median CPU time of {rounds} rounds over that of transformers' own cache in the same process "
        f"({plain}).",
    ]


def _ratios(row: dict[str, Any], full: dict[str, Any] | None, *keys: str) -> dict[str, dict[str, float]]:
    """Return each side's measured value, over that of the full cache where one is given, under its first key."""
    return {
        side: {keys[0]: _at(row[side], keys) / (1.0 if full is None else _at(full[side], keys))}
        for side in ("kvpress", "pikv")
    }


def _both(row: dict[str, Any], key: str, form: str) -> str:
    return " / ".join(form.format(row[side][key]) for side in ("kvpress", "pikv"))


def _at(tree: Any, keys: tuple[str, ...]) -> float:
    for key in keys:
        tree = tree[key]
    return tree
