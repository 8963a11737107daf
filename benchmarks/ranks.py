"""What splitting a cache over ranks costs and saves: bytes sent and held, and speed, on 1, 2 and 4 ranks of gloo.

    python benchmarks/ranks.py [--tokens 64] [--rounds 3] [--split shards]

A random llama of 4 layers, 8/4 heads of 32, float32, a prompt of 2,000 tokens, one thread a rank. Speeds are medians
over rounds, of settings that take turns. What the loopback interface carried is the difference between runs of two
lengths, headers included, all other traffic of the machine too. Results go to benchmarks/results/ranks.json and .md;
those of one split alone take the place of its own that were there.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from peers.report import commit, machine

RESULTS = Path(__file__).parent / "results"
LAYERS, HEADS, KV_HEADS, HEAD_DIM = 4, 8, 4, 32
SETTINGS = [(1, None), (2, "heads"), (4, "heads"), (2, "tokens"), (4, "tokens")]
SETTINGS += [(1, "shards"), (2, "shards"), (4, "shards")]  # the first one is a process by itself
SHARDS = ["--policy", "expert-shards", "--top-shards", "2"]
PROMPT = " ".join(f"f{number % 90} k{number % 37} v{number % 41} f{number % 13}" for number in range(500))


def main() -> None:
    """Measure, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--split", choices=["heads", "tokens", "shards"])
    arguments = parser.parse_args()
    found: list[dict[str, Any]] = [
        {"ranks": count, "split": split, "commit": commit(), "speeds": []}
        for count, split in SETTINGS
        if arguments.split in (None, split)
    ]
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        make_model(model)
        for number in range(arguments.rounds):
            for row in found:
                measure(row, model, arguments.tokens, Path(folder) / f"{number}-{row['ranks']}-{row['split']}")
    if arguments.split is not None:
        before = json.loads((RESULTS / "ranks.json").read_text(encoding="utf-8"))["rows"]
        found = [row for row in before if row["split"] != arguments.split] + found
    told = {"machine": machine(), "tokens": arguments.tokens, "rows": found}
    (RESULTS / "ranks.json").write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    (RESULTS / "ranks.md").write_text(table(told), encoding="utf-8")
    print(table(told))


def make_model(folder: Path) -> None:
    """Write a random llama with the recall task's words."""
    import torch
    import transformers

    from pikv_core.data.recall import Recall
    from pikv_core.runs import Reporter

    source = Recall().open(None, 0, [], None, Reporter())
    config = transformers.LlamaConfig(
        vocab_size=source.vocab_size,
        hidden_size=HEADS * HEAD_DIM,
        intermediate_size=512,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=4096,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    source.save(folder)


def measure(row: dict[str, Any], model: Path, num_tokens: int, out: Path) -> None:
    """Run two lengths, and note in the row what the longer one tells and what the loopback carried more."""
    carried = []
    for number, length in enumerate((num_tokens, 3 * num_tokens)):
        before = loopback_bytes()
        result = generate(row["ranks"], row["split"], model, length, out / str(number))
        carried.append(loopback_bytes() - before)
    row["speeds"].append(result["tokens_per_s"])
    row["resident_bytes"] = result["resident_bytes_by_rank"] or [result["resident_bytes"]]
    row["full_bytes"] = result["full_bytes"]
    row["bytes_per_token"] = result["communicated_bytes_per_token"] or 0
    row.setdefault("loopback_bytes_per_token", []).append((carried[1] - carried[0]) / (2 * num_tokens) / row["ranks"])
    row.setdefault("token_ids", result["token_ids"])
    assert row["token_ids"] == result["token_ids"]


def generate(count: int, split: str | None, model: Path, num_tokens: int, out: Path) -> dict[str, Any]:
    """Return the result of a run."""
    start = [sys.executable]
    words = ["--model", str(model), "--max-new-tokens", str(num_tokens), "--threads", "1", "--out", str(out)]
    words += SHARDS if split == "shards" else []
    if count > 1:
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
        words += ["--split", str(split)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
    done = subprocess.run([*start, "-m", "pikv_cli", "generate", PROMPT, *words], env=environment, capture_output=True)
    if done.returncode:
        raise SystemExit(done.stderr.decode())
    return json.loads((out / "result.json").read_text(encoding="utf-8"))["result"]


def loopback_bytes() -> int:
    """Return how many bytes the loopback interface has received."""
    for line in Path("/proc/net/dev").read_text(encoding="utf-8").splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == "lo":
            return int(numbers.split()[0])
    raise SystemExit("no loopback interface in /proc/net/dev")


def formula(count: int, split: str | None) -> int:
    """Return the bytes that come to each rank for a token."""
    if count == 1:
        return 0
    if split == "heads":
        return LAYERS * HEADS * HEAD_DIM * 4 * (count - 1) // count + 8 * (count - 1)
    return LAYERS * HEADS * (HEAD_DIM * 4 + 4) * (count - 1) + 8 * (count - 1)


def table(told: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    head = ["ranks", "split", "bytes a token: formula", "counted", "loopback, headers too", "resident, most of a rank"]
    head += ["of all", "tokens/s", "rounds", "same tokens", "commit"]
    lines = [
        "# A cache over ranks",
        "",
        f"`benchmarks/ranks.py` on {told['machine']}; a random llama of {LAYERS} layers, "
        f"{HEADS}/{KV_HEADS} heads of {HEAD_DIM}, float32, {len(PROMPT.split()):,} prompt tokens, one thread a rank. "
        "Bytes a token are those that come to each rank; what the loopback interface carried has headers and the "
        "machine's other traffic in it. Speeds are medians of the rounds. By shards the policy is `expert-shards`, "
        "which reads two of eight shards, on one process too.",
        "",
        f"| {' | '.join(head)} |",
        f"|{'---|' * len(head)}",
    ]
    first = told["rows"][0]
    for row in told["rows"]:
        first = row if row["ranks"] == 1 else first
        held, whole = row["resident_bytes"], sum(first["resident_bytes"])
        carried = statistics.median(row["loopback_bytes_per_token"])
        same = "yes" if row["token_ids"] == first["token_ids"] else "no"
        cells = [str(row["ranks"]), row["split"] or "", f"{formula(row['ranks'], row['split']):,}"]
        cells += [f"{row['bytes_per_token']:,.0f}", f"{carried:,.0f}", f"{max(held):,} ({max(held) / whole:.3f})"]
        cells += [f"{sum(held):,}", f"{statistics.median(row['speeds']):.0f}", str(len(row["speeds"])), same]
        cells.append(row["commit"][:12])
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
