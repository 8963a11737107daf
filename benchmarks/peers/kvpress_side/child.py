"""kvpress's side of the comparison, run inside kvpress's own environment: `python child.py JOB.json`.

The job names the saved model, the prompts and the presses; what each press keeps, scores, holds and costs is written
to the files it names. The folder holds no module called kvpress, so that the package itself is imported.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import sys
from pathlib import Path
from typing import Any

import kvpress
import numpy as np
import torch
from protocol import Side, load, measure
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar


class Pressed(Side):
    """A prompt that a press compresses at the end of its prefill; `share` of the tokens is kept."""

    def __init__(self, model: Any, press: str, options: dict[str, Any], share: float):
        super().__init__(model)
        self.share = share
        self.press = getattr(kvpress, press)(**options)

    def feed(self, cache: Any, ids: torch.Tensor) -> None:
        length = ids.shape[1]
        # A press truncates length * (1 - ratio): a millionth of a token keeps that from falling one short.
        self.press.compression_ratio = 1 - (int(self.share * length) + 1e-6) / length
        with self.press(self.model):
            super().feed(cache, ids)


@torch.no_grad()
def kept(side: Pressed, ids: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return the kept positions [N,G,K] and the scores [N,G,C] of each layer, for prompts [N,C]."""
    scores: list[torch.Tensor] = []
    score = side.press.score

    def watched(*args: Any) -> torch.Tensor:
        scores.append(score(*args))
        return scores[-1]

    full, cache = side.new(ids.shape[1]), side.new(ids.shape[1])
    Side(side.model).feed(full, ids)
    side.press.score = watched
    try:
        side.feed(cache, ids)
    finally:
        del side.press.score
    positions = []
    for before, after, given in zip(full.layers, cache.layers, scores, strict=True):
        chosen = given.topk(after.keys.shape[2], dim=-1).indices
        index = chosen[..., None].expand(-1, -1, -1, before.keys.shape[-1])
        assert torch.equal(before.keys.gather(2, index), after.keys), "the press keeps other keys than its best scored"
        positions.append(chosen.sort(dim=-1).values)
    return positions, scores


def main() -> None:
    """Read the job, measure every press, write the report (JSON) and the kept positions (.npz)."""
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.set_num_threads(1)
    disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32).eval()
    groups = load(Path(job["prompts"]))
    sides = {
        label: Pressed(model, method["press"], method["options"], method["share"])
        for label, method in job["methods"].items()
    }
    arrays: dict[str, np.ndarray] = {}
    for label, side in sides.items():
        for group, prompts in enumerate(groups):
            positions, scores = kept(side, prompts.context[: job["num_compared"]])
            for layer, (chosen, given) in enumerate(zip(positions, scores)):
                arrays[f"{label}/{group}/{layer}/kept"] = chosen.numpy()
                arrays[f"{label}/{group}/{layer}/score"] = given.numpy()
    np.savez(job["positions"], **arrays)  # type: ignore[arg-type]
    report = {
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("kvpress", "torch", "transformers")},
        },
        "measured": measure(sides, model, groups, job["timed_tokens"], job["rounds"]),
    }
    Path(job["report"]).write_text(json.dumps(report), encoding="utf-8")


if __name__ == "__main__":
    main()
