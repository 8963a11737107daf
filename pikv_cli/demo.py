"""The main job from nothing, as `make demo` runs it: data, training, the sweep, generation, a replayed log.

Each step is one `pikv` command, shown before it runs; the last table is read from the runs' result.json.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import typer

from pikv_cli import output


def main() -> None:
    """Run every verb on the tiny recipe under the next free folder runs/demo-<n>."""
    folder = _next_folder(Path("runs"))
    rows: list[dict[str, Any]] = []

    def step(name: str, *arguments: str) -> dict[str, Any]:
        out = folder / name
        command = ["pikv", *arguments, "--out", str(out)]
        typer.secho(f"\n$ {shlex.join(command)}", bold=True)
        start = time.perf_counter()
        code = subprocess.call([sys.executable, "-m", "pikv_cli", *command[1:]])
        if code != 0:
            typer.echo(f"error: the step '{name}' failed with exit code {code}", err=True)
            sys.exit(code)
        result = json.loads((out / "result.json").read_text())["result"]
        rows.append({"step": name, "seconds": time.perf_counter() - start, "where": str(out)})
        return result

    def measured(text: str) -> None:
        rows[-1]["measured"] = text

    step("recall-data", "gen-data", "recall", "--num-samples", "1000")
    data = folder / "recall-data"
    measured("1,000 prompts of 512 tokens with needles")

    trained = step("train", "train", "--recipe", "recipes/train/recall-tiny.yaml", "--set", f"data.path={data}")
    metrics = trained["metrics"]
    measured(", ".join(f"{name} {metrics[name]:.3f}" for name in metrics if name.startswith("recall_")))

    model = str(folder / "train")
    swept = step("compress", "compress", "--recipe", "recipes/compress/demo.yaml", "--model", model)["results"]
    best = min((row for row in swept if row["recall"] >= 0.9), key=lambda row: row["resident_bytes"])
    measured(
        f"{len(swept)} methods; least bytes with recall >= .9: {best['policy']}+{best['codec']} at {best['budget']} "
        f"({best['resident_bytes'] / best['full_bytes']:.3f} of the bytes, recall {best['recall']:.3f})"
    )

    sample = json.loads((data / "samples.test.jsonl").open().readline())
    prompt = folder / "prompt.txt"
    prompt.write_text(sample["prompt"])
    told = step(
        "generate", "generate", "--recipe", "recipes/generate/h2o-int8.yaml", "--model", model,
        "--prompt-file", str(prompt), "--max-new-tokens", "1",
    )  # fmt: skip
    measured(
        f"asked for {sample['answers'][0]['key']}: got {told['text']}, the context says "
        f"{sample['answers'][0]['value']}; {told['resident_bytes'] / told['full_bytes']:.3f} of the bytes"
    )

    step("requests", "gen-data", "requests", "--num-samples", "5000")
    measured("5,000 requests with shared prefixes and sessions")
    trace = str(folder / "requests" / "requests.jsonl")
    replayed = step("simulate", "simulate-cache", trace, "--recipe", "recipes/simulate/demo.yaml")
    top = max((row for row in replayed["results"] if row["policy"] == "lru"), key=lambda row: row["capacity_blocks"])
    measured(
        f"lru hits {top['block_hit_ratio']:.3f} of the blocks at {top['capacity_blocks']:,}; "
        f"at most {replayed['ceiling_hit_ratio']:.3f} at any size"
    )

    typer.echo()
    output.print_table("What was measured, and where it lies", ["step", "seconds", "measured", "where"], rows)


def _next_folder(runs: Path) -> Path:
    number = 1
    while True:
        folder = runs / f"demo-{number}"
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            number += 1


if __name__ == "__main__":
    main()
