"""The examples of CONTRIBUTING.md run as they stand, each as the file that its heading names."""

import itertools
import json
import os
import random
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
import transformers
from small_models import CONFIGS

from pikv_core.cache import PiKVCache
from pikv_core.compression import CODECS
from pikv_core.data.recall import Recall
from pikv_core.errors import PiKVError
from pikv_core.moe import create_moe
from pikv_core.moe.routers import ROUTERS
from pikv_core.registry import load_installed_plugins, load_plugin
from pikv_core.runs import Reporter
from pikv_core.scheduling import POLICIES
from pikv_core.scheduling.allocation import ALLOCATIONS
from pikv_core.simulation import load as loading
from pikv_core.simulation.kept_columns import place
from pikv_core.simulation.load import load
from pikv_core.simulation.policies import REQUEST_POLICIES
from pikv_core.simulation.readers import READERS
from pikv_core.simulation.replay import replay
from pikv_core.simulation.trace import make_trace

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
MINE = ("peak.py", "token8.py", "first_layer.py")
SIMULATED = ("hit_first.py", "tabbed.py")


@pytest.fixture
def files(tmp_path):
    """Write each example into its file; what they register is forgotten afterwards."""
    examples = re.findall(r"^## [^\n]*`(?:\S+/)?(\w+\.py)`\n```python\n(.*?)```", TEXT, re.DOTALL | re.MULTILINE)
    assert len(examples) == TEXT.count("```python") == len(MINE) + len(SIMULATED) + 1
    for name, code in examples:
        (tmp_path / name).write_text(code, encoding="utf-8")
    registries = (POLICIES, CODECS, ALLOCATIONS, ROUTERS, REQUEST_POLICIES, READERS)
    yield tmp_path
    for registry in registries:  # members of the tree stay: their files run once
        tree = {name: made for name, made in registry._classes.items() if made.__module__.startswith("pikv_core.")}
        registry._classes = tree


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A small random model that knows the recall task's words."""
    folder = tmp_path_factory.mktemp("model")
    source = Recall().open(None, 0, [], None, Reporter())
    config = CONFIGS["llama"]()
    config.vocab_size = source.vocab_size
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    source.save(folder)
    return folder


def command(block, *more, **environment):
    """Run a command that CONTRIBUTING shows, by this Python, in the folder PYTHONPATH or the tree's."""
    module = {"pikv": "pikv_cli", ".venv/bin/python": None}
    words = [word for word in shlex.split(block.replace("\\\n", " ")) if not word.startswith("PYTHONPATH=")]
    own = module[words[0]]
    arguments = words[1:] if own is None else ["-m", own, *words[1:]]
    return subprocess.run(
        [sys.executable, *arguments, *map(str, more)],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
        capture_output=True,
        text=True,
    )


def shown(part):
    """Return the command of CONTRIBUTING that has this in it."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)
    return next(block for language, block in blocks if not language and part in block)


def test_the_policy_keeps_peaks_and_the_newest(files, small_model):
    for name in MINE:
        load_plugin(files / name)
    model = small_model("llama")
    ids = torch.randint(1, 97, (1, 60), generator=torch.Generator().manual_seed(0))
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attention = model(ids, output_attentions=True).attentions
        cache = PiKVCache.for_model(model, {"policy": {"name": "peak", "recent": 5}, "budget": 20})
        model(ids, past_key_values=cache)
    for layer, probs in enumerate(attention):
        peaks = probs[0].unflatten(0, (2, 2)).amax(dim=(1, 2))  # [G,S]
        peaks[:, -5:] = torch.inf
        for head in range(2):
            kept = cache.positions[layer][0, head].tolist()
            assert sorted(kept) == sorted(peaks[head].topk(20).indices.tolist())


def test_the_codec_errs_by_half_a_step_and_the_allocation_favours_the_first_layer(files, small_model):
    for name in MINE:
        load_plugin(files / name)
    model = small_model("llama")
    ids = torch.randint(1, 97, (1, 60), generator=torch.Generator().manual_seed(0))
    caches = {}
    for codec in ("none", "token8"):
        recipe = {"policy": "peak", "budget": 16, "codec": codec, "allocation": "first-layer"}
        caches[codec] = PiKVCache.for_model(model, recipe)
        with torch.no_grad():
            model(ids, past_key_values=caches[codec])
    lengths = [position.shape[2] for position in caches["token8"].positions]
    assert lengths == [24, 12, 12]
    assert caches["token8"].resident_bytes < 0.5 * caches["none"].resident_bytes
    for exact, coded in zip(caches["none"].retrieve(0)[:2], caches["token8"].retrieve(0)[:2]):
        half_step = exact.abs().amax(dim=-1, keepdim=True) / 254
        assert ((exact - coded).abs() <= 1.001 * half_step).all() and not torch.equal(exact, coded)


def test_the_router_jitters_while_training_alone(files):
    load_plugin(files / "jittered.py")
    moe = create_moe("jittered", hidden_size=16, num_experts=4)
    x = torch.randn(3, 16)
    assert not torch.equal(moe(x)[0], moe(x)[0])
    moe.eval()
    assert torch.equal(moe(x)[0], moe(x)[0])


@pytest.mark.parametrize("enough", [1, 2])
def test_the_block_policy_keeps_what_was_hit(files, enough):
    load_plugin(files / "hit_first.py")
    policy = REQUEST_POLICIES["hit-first"](enough=enough)
    random_ = random.Random(0)
    for capacity in (1, 2, 5, 9):
        blocks = [int(random_.paretovariate(0.6)) % 23 for _ in range(400)]
        hits, cached, num_hits = [], [], {}  # cached: by last use, the oldest first
        for block in blocks:
            hits.append(int(block in cached))
            if block in cached:
                num_hits[block] += 1
                cached.remove(block)
            else:
                if len(cached) == capacity:
                    cached.remove(min(cached, key=lambda held: num_hits[held] >= enough))
                num_hits[block] = 0
            cached.append(block)
        trace = make_trace([[block] for block in blocks])
        assert replay(trace, policy, capacity, "object", backend="python").hits.tolist() == hits


def test_the_reader_reads_and_names_damaged_lines(files, monkeypatch):
    load_plugin(files / "tabbed.py")
    monkeypatch.setattr(loading, "KEEP_FROM_S", 0)
    monkeypatch.setattr(loading, "KEEP_FROM_BYTES", 0)
    log = files / "my.tsv"
    lines = ["seconds\ttokens\thash_ids", "2.5\t40\t7 8 9", "1\t20\t7 5", "3\t-1\t7", "nan\t1\t7", "3\t1\t7 x", "3\t1"]
    log.write_text("\n".join(lines))
    read = load(str(log), skip_bad_lines=True)
    assert (read.format, read.skipped_lines, read.trace.block_tokens) == ("tabbed", 4, 16)
    assert read.trace.timestamps_ms.tolist() == [0, 1500]
    assert read.trace.input_tokens.tolist() == [20, 40]
    first, second = (read.trace.ids[begin:end].tolist() for begin, end in itertools.pairwise(read.trace.starts))
    assert (len(first), len(second), len({*first, *second})) == (2, 3, 4) and first[0] == second[0]
    with pytest.raises(PiKVError, match=r"my.tsv:4: tokens"):
        load(str(log))
    log.write_text("\n".join(lines[:3]))
    assert load(str(log)).trace.num_requests == 2
    assert not place(log).exists()  # kept columns know the text of the tree's readers alone


def test_a_replay_takes_the_plugins_as_shown(files):
    prompts = [[*range(3 * (n % 4), 3 * (n % 4) + 3), 100 + n] for n in range(40)]
    rows = ["\t".join([str(n), "64", " ".join(map(str, prompt))]) for n, prompt in enumerate(prompts)]
    (files / "my.tsv").write_text("\n".join(["seconds\ttokens\thash_ids", *rows]))
    block = shown("--plugin tabbed.py")
    for name in (*SIMULATED, "my.tsv"):
        block = block.replace(name, str(files / name))
    done = command(block, "--out", files / "run", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    ratios = {(row["policy"], row["capacity_blocks"]): row["block_hit_ratio"] for row in told["results"]}
    assert told["format"] == "tabbed" and len(ratios) == 6
    assert ratios["lru", 10] == 0  # a prompt comes again after 13 other blocks or more
    assert ratios["lru", 100] == ratios["hit-first", 100] == told["ceiling_hit_ratio"] == 108 / 160
    assert ratios["hit-first", 10] <= ratios["belady", 10] and ratios["belady", 10] > 0


def test_a_sweep_takes_the_plugins_as_shown(files, model_folder):
    block = shown("pikv compress").replace("DIR", str(model_folder))
    for name in MINE[:2]:
        block = block.replace(name, str(files / name))
    small = [f"--set={key}" for key in ("context_tokens=96", "num_queries=16", "num_texts=2")]
    done = command(
        block, *small, "--out", files / "run", "--plugin", files / "first_layer.py", "--json", "--tasks=recall"
    )
    assert done.returncode == 0, done.stderr
    rows = {row["method"]: row for row in json.loads(done.stdout)["results"]}
    assert list(rows) == ["full", "h2o", "peak", "peak+token8"]
    assert rows["peak+token8"]["resident_bytes"] < 0.6 * rows["peak"]["resident_bytes"]
    assert rows["peak"]["resident_bytes"] < 0.3 * rows["full"]["resident_bytes"]
    assert all(0 <= row["recall"] <= 1 for row in rows.values())


def test_a_package_offers_its_members_by_entry_point(files, monkeypatch):
    points = tomllib.loads(re.search(r"```toml\n(.*?)```", TEXT, re.DOTALL)[1])["project"]["entry-points"]
    (group, members), *others = points.items()
    package, module = members["peak"].split(".")
    assert not others and "peak" not in POLICIES.names()
    (files / package).mkdir()
    (files / "peak.py").rename(files / package / f"{module}.py")
    (files / f"{package}-1.dist-info").mkdir()
    (files / f"{package}-1.dist-info" / "METADATA").write_text(f"Name: {package}\nVersion: 1\n")
    lines = [f"[{group}]", *(f"{name} = {target}" for name, target in members.items())]
    (files / f"{package}-1.dist-info" / "entry_points.txt").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(str(files))
    load_installed_plugins()
    assert POLICIES["peak"].__module__ == members["peak"]


@pytest.mark.slow
def test_the_contract_tests_take_the_examples_as_shown(files):
    done = command(shown("pytest"), PYTHONPATH=str(files))
    assert done.returncode == 0, done.stdout[-3000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 100


def test_every_contract_that_is_named_exists_and_runs_over_names():
    named = re.findall(r"^\| `(tests/\S+\.py)` \|", TEXT, re.MULTILINE)
    assert len(named) == 7
    for file in named:
        assert ".names()" in (ROOT / file).read_text(encoding="utf-8")
