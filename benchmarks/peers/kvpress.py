"""PiKV beside kvpress 0.5.5 on one saved model and the same prompts: kept tokens, recall, bytes, prefill overhead.

    python benchmarks/peers/kvpress.py --model runs/text-recall-latest [--env PYTHON]

kvpress wants an older transformers, so its side (kvpress_side/child.py) runs in an environment of its own, made in
.venv-kvpress where --env names none. Each press compresses the context, then every question is asked one token per
step over it and forgotten; both sides run the same protocol (kvpress_side/protocol.py) in float32 on one thread.
Bytes are those of the live tensors; prefill times are ratios to transformers' own cache in the same process.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from agreement import TIE, Agreement, compare
from kvpress_side.protocol import Prompts, Side, measure, save
from peer import ROOT, peer_python
from report import commit, machine, table

from pikv_core import recipes
from pikv_core.cache import PiKVCache
from pikv_core.evaluation.prompts import read_text, recall_prompts
from pikv_core.files import sha256, write_json, write_text
from pikv_core.model.loading import LoadedModel, load_model
from pikv_core.runs import Reporter, versions

PEER_PACKAGES = ("kvpress==0.5.5", "transformers==5.2.0", "torch==2.13.0")


@dataclass(frozen=True)
class Method:
    """One rule as both sides spell it: a press with its options, a policy and an allocation with theirs."""

    press: str
    options: dict[str, Any]
    policy: dict[str, Any]
    allocation: dict[str, Any] = field(default_factory=lambda: {"name": "uniform"})


SNAPKV = Method("SnapKVPress", {"window_size": 64, "kernel_size": 5}, {"name": "snapkv", "window": 64, "kernel": 5})
METHODS = {
    "streaming-llm": Method("StreamingLLMPress", {"n_sink": 4}, {"name": "streaming-llm", "sinks": 4}),
    "knorm": Method("KnormPress", {}, {"name": "knorm"}),
    "keydiff": Method("KeyDiffPress", {}, {"name": "keydiff"}),
    "snapkv": SNAPKV,
    "tova": Method("TOVAPress", {}, {"name": "tova"}),
    "expected-attention": Method(
        "ExpectedAttentionPress",
        {"n_future_positions": 512, "n_sink": 4, "epsilon": 1e-2},  # kvpress's own default is 0
        {"name": "expected-attention", "sinks": 4, "epsilon": 1e-2},
    ),
    "pyramid": Method(
        "PyramidKVPress",
        {**SNAPKV.options, "beta": 20},
        SNAPKV.policy,
        {"name": "pyramid", "form": "kvpress", "window": 64, "beta": 20},
    ),
}


class OwnSide(Side):
    """A prompt held by PiKVCache; the cache is held open while questions are asked, so that none drops a token."""

    def __init__(self, model: Any, method: Method, share: float):
        super().__init__(model)
        self.method, self.share = method, share

    def new(self, num_tokens: int) -> PiKVCache:
        cache = {"policy": self.method.policy, "allocation": self.method.allocation}
        budget = int(self.share * num_tokens)
        return PiKVCache.for_model(self.model, {**cache, "budget": budget})

    def feed(self, cache: PiKVCache, ids: torch.Tensor) -> None:
        super().feed(cache, ids)
        cache.hold()

    def forget(self, cache: PiKVCache, num_tokens: int) -> None:
        cache.rewind(num_tokens)

    def num_bytes(self, cache: PiKVCache) -> int:
        return cache.resident_bytes

    @torch.no_grad()
    def kept(self, ids: torch.Tensor) -> list[np.ndarray]:
        """Return each layer's stored positions [N,G,S] after prompts [N,C]; -1 is an empty slot."""
        cache = self.new(ids.shape[1])
        self.feed(cache, ids)
        return [cache.retrieve(layer)[2].numpy() for layer in range(len(cache.layers))]


def main() -> None:
    """Measure both sides and write kvpress.json and kvpress.md."""
    arguments = _arguments()
    torch.set_num_threads(1)
    flags = {"model": arguments.model, "dtype": "float32", "device": "cpu", "threads": 1}
    recipe = recipes.load("compress", flags=flags)
    loaded = load_model(recipe.model, recipe)
    text = read_text(loaded, [], None, recipe.seed, Reporter())
    asked = recall_prompts(loaded, text and text[0], arguments.queries, arguments.context, recipe.seed)
    groups = [Prompts(group.context, group.questions, group.answers) for group in asked]
    cells = {f"{name} at {share}": (method, share) for share in arguments.shares for name, method in METHODS.items()}
    sides = {label: OwnSide(loaded.model, method, share) for label, (method, share) in cells.items()}
    with tempfile.TemporaryDirectory() as folder:
        peer, positions = _run_peer(arguments, loaded, groups, cells, Path(folder))
    _say("measuring PiKV")
    own = measure(sides, loaded.model, groups, arguments.timed, arguments.rounds)
    compared = [group.context[: arguments.compared] for group in groups]
    agreements = {label: _agreement(label, side, compared, positions) for label, side in sides.items()}
    found = {
        "machine": machine(),
        "commit": commit(),
        "pikv": versions(),
        "kvpress": peer["versions"],
        "setting": {
            "model": _describe(loaded),
            "num_queries": sum(group.answers[..., 0].numel() for group in groups),
            "context_tokens": sorted({group.context.shape[1] for group in groups}),
            "num_compared_prompts": sum(len(ids) for ids in compared),
            "tie": TIE,
            "timed_tokens": arguments.timed,
            "rounds": arguments.rounds,
            "dtype": "float32",
            "threads": 1,
            "methods": {name: asdict(method) for name, method in METHODS.items()},
        },
        "full": {"kvpress": peer["measured"]["full"], "pikv": own["full"]},
        "results": {
            label: {"agreement": agreement.summary(), "kvpress": peer["measured"][label], "pikv": own[label]}
            for label, agreement in agreements.items()
        },
    }
    shown = table(found)
    write_json(arguments.out / "kvpress.json", found)
    write_text(arguments.out / "kvpress.md", shown)
    print(shown)


def _arguments() -> argparse.Namespace:
    def numbers(kind: type) -> Any:
        return lambda text: [kind(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a run or model folder that plain transformers loads")
    parser.add_argument("--env", type=Path, help="the Python of an environment with kvpress 0.5.5")
    parser.add_argument("--shares", type=numbers(float), default=[0.5, 0.25], help="of the context that is kept")
    parser.add_argument("--context", type=int, default=1024, help="tokens of a prompt with its questions")
    parser.add_argument("--queries", type=int, default=2000)
    parser.add_argument("--compared", type=int, default=4, help="prompts of each layout whose kept tokens are compared")
    parser.add_argument(
        "--timed", type=numbers(int), default=[1024, 4096], help="prompt lengths that are timed, above the window of 64"
    )
    parser.add_argument("--rounds", type=int, default=7, help="prefills that a median is taken of")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    return parser.parse_args()


def _run_peer(
    arguments: argparse.Namespace,
    loaded: LoadedModel,
    groups: list[Prompts],
    cells: dict[str, tuple[Method, float]],
    folder: Path,
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return kvpress's report, and its kept positions and scores by `<label>/<group>/<layer>/kept|score`."""
    python = arguments.env or peer_python("kvpress", PEER_PACKAGES)
    save(folder / "prompts.npz", groups)
    job = {
        "model": str(Path(loaded.source).resolve()),
        "prompts": str(folder / "prompts.npz"),
        "positions": str(folder / "positions.npz"),
        "report": str(folder / "report.json"),
        "methods": {
            label: {"press": method.press, "options": method.options, "share": share}
            for label, (method, share) in cells.items()
        },
        "num_compared": arguments.compared,
        "timed_tokens": arguments.timed,
        "rounds": arguments.rounds,
    }
    (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
    _say("measuring kvpress")
    child = Path(__file__).parent / "kvpress_side" / "child.py"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([python, child, folder / "job.json"], check=True, env={**environment, "HF_HUB_OFFLINE": "1"})
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    with np.load(folder / "positions.npz") as arrays:
        return report, dict(arrays)


def _agreement(label: str, side: OwnSide, compared: list[torch.Tensor], peer: dict[str, np.ndarray]) -> Agreement:
    heads = []
    for group, ids in enumerate(compared):
        for layer, position in enumerate(side.kept(ids)):
            theirs, score = (peer[f"{label}/{group}/{layer}/{what}"] for what in ("kept", "score"))
            heads += [
                (theirs[row, head], position[row, head][position[row, head] >= 0], score[row, head])
                for row, head in np.ndindex(theirs.shape[:2])
            ]
    return compare(heads)


def _describe(loaded: LoadedModel) -> dict[str, Any]:
    config = loaded.model.config
    names = ("model_type", "num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    digest = sha256(Path(loaded.source) / "model.safetensors")
    return {name: getattr(config, name) for name in names} | {"safetensors_sha256": digest}


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
