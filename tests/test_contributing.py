"""The examples of CONTRIBUTING.md run as they stand, each as the file that its heading names."""

import json
import os
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
from pikv_core.moe import create_moe
from pikv_core.moe.routers import ROUTERS
from pikv_core.registry import load_installed_plugins, load_plugin
from pikv_core.runs import Reporter
from pikv_core.scheduling import POLICIES
from pikv_core.scheduling.allocation import ALLOCATIONS

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
MINE = ("peak.py", "token8.py", "first_layer.py")


@pytest.fixture
def files(tmp_path):
    """Write each example into its file; what they register is forgotten afterwards."""
    examples = re.findall(r"^## [^\n]*`(?:\S+/)?(\w+\.py)`\n```python\n(.*?)```", TEXT, re.DOTALL | re.MULTILINE)
    assert len(examples) == TEXT.count("```python") == len(MINE) + 1
    for name, code in examples:
        (tmp_path / name).write_text(code, encoding="utf-8")
    registries = (POLICIES, CODECS, ALLOCATIONS, ROUTERS)
    before = [dict(registry._classes) for registry in registries]
    yield tmp_path
    for registry, classes in zip(registries, before):
        registry._classes = classes


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
    assert len(named) == 5
    for file in named:
        assert ".names()" in (ROOT / file).read_text(encoding="utf-8")
