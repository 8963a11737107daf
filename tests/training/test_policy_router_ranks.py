"""Routers over strategies trained under torchrun: ranks share what is measured, and come to what one process does."""

import json
import os
import pickle
import signal
import subprocess
import threading
import time

import pytest
import torch
import transformers
from safetensors.torch import load_file
from small_models import SMALL
from test_ranks import run, torchrun

from pikv_core import collectives
from pikv_core.cache import calibration
from pikv_core.data.recall import Recall, RecallSource
from pikv_core.data.tokenizer import build_word_level
from pikv_core.errors import PiKVError
from pikv_core.scheduling.moe_router import MoERouter
from pikv_core.schema import PolicyRouterSettings
from pikv_core.training import policy_router, router_lessons

TASK = Recall(num_keys=16, num_values=8, num_filler=16)
SETTINGS = PolicyRouterSettings(length=64, budgets=[0.5, 0.3])
NUM = 5  # prompts, in three turns
STRATEGIES = ("aggressive", "snapkv", "conservative")


@pytest.fixture(scope="module")
def source():
    return RecallSource(TASK, build_word_level(TASK.words()))


@pytest.fixture(scope="module")
def model(source):
    torch.manual_seed(0)
    sizes = {**SMALL, "vocab_size": source.vocab_size, "num_hidden_layers": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.15)
    return model.eval()


@pytest.fixture
def opened(tmp_path, model, source):
    """Return a function: options of the policy → it, its routers as they start, and what yields held prompts."""

    def open_policy(**options):
        policy = MoERouter(strategies=STRATEGIES, **options)
        start = policy_router.untrained(model, policy, {}, 0, policy.width(model.config.head_dim))
        options = {"strategies": list(STRATEGIES), **options}
        member = calibration.Member("moe-router", "policy", options, start)
        nothing = calibration.Corpus(source="", sha256="", num_tokens=0)
        calibration.save(tmp_path / "start", "small", model, nothing, [member])
        recipe = {"policy": {"name": "moe-router", **options}, "calibration": [str(tmp_path / "start")]}
        return policy, start, lambda: router_lessons.held_prompts(model, recipe, source, SETTINGS, NUM, 1, "train")

    return open_policy


class Asked(Exception):
    """A rank has measured its share."""


def on_ranks(monkeypatch, count, work, told_on=0):
    """Return what `work` comes to on one of `count` ranks, whose shares are measured one after another."""
    shares = []

    def take(share):
        shares.append(pickle.dumps(share))
        raise Asked

    def be(rank):
        monkeypatch.setattr(collectives, "rank", lambda: rank)

    def fail(*args):
        raise AssertionError("the others are not asked while a rank measures")

    monkeypatch.setattr(collectives, "num_started", lambda: count)
    monkeypatch.setattr(torch.distributed, "all_reduce", fail)
    monkeypatch.setattr(router_lessons, "everyones", take)
    for rank in range(count):
        be(rank)
        with pytest.raises(Asked):
            work()
    monkeypatch.setattr(router_lessons, "everyones", lambda own: [pickle.loads(share) for share in shares])
    be(told_on)
    return work()


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("options", [{"cache_aware": True}, {"mode": "native"}], ids=str)
def test_what_ranks_measure_is_what_one_process_does(monkeypatch, opened, count, options):
    policy, start, prompts = opened(**options)

    def lessons():
        return vars(router_lessons.gather(prompts(), policy_router.choice(policy, start)))

    def measured():
        metrics, chosen, kinds = policy_router.measure(prompts(), policy, start, start, seed=0)
        return {"metrics": metrics, "chosen": chosen, "kinds": kinds}

    def singles():
        return {"best": policy_router.best_single(prompts())}

    def hedged():
        fitted, *leaning = policy_router.hedge(prompts(), policy, {1.0: start}, 1)
        return {**fitted, "leaning": leaning}

    works = (lessons, measured, singles, hedged)
    alone = [work() for work in works]
    for one, work in zip(alone, works):
        other = on_ranks(monkeypatch, count, work)
        assert one.keys() == other.keys()
        for name, value in one.items():
            assert torch.equal(value, other[name]) if torch.is_tensor(value) else value == other[name], name
    N = NUM * len(SETTINGS.budgets)
    assert alone[0]["cost"].shape == (2, N, 3) and alone[0]["num_tokens"] == NUM * SETTINGS.length
    assert alone[1]["kinds"] == ["needles\n0.5"] * 2 + ["needles\n0.3"] * 2 + alone[1]["kinds"][:4] + [
        "needles\n0.5",
        "needles\n0.3",
    ]


def test_every_turn_is_measured_by_one_rank(monkeypatch, opened):
    _, _, prompts = opened()
    shares = []
    monkeypatch.setattr(collectives, "num_started", lambda: 2)
    for rank in range(2):
        monkeypatch.setattr(collectives, "rank", lambda rank=rank: rank)
        shares.append([held.place for held in prompts()])
    assert shares == [[(0, 0), (0, 1), (2, 0), (2, 1)], [(1, 0), (1, 1)]]


def test_any_choice_is_drawn_for_the_place_of_a_prompt():
    class At:
        shape = (8, 16, 3)

        def __init__(self, *place):
            self.place = place

    choose = router_lessons.at_random(3)
    one, other = choose(At(0, 1)), choose(At(4, 0))
    assert torch.equal(router_lessons.at_random(3)(At(4, 0)), other) and torch.equal(choose(At(0, 1)), one)
    assert len({str(x) for x in (one, other, choose(At(0, 0)), router_lessons.at_random(4)(At(0, 1)))}) == 4
    assert bool((one.sum(dim=-1) == 1).all()) and bool((one.mean(dim=(0, 1)) > 0.2).all())


@pytest.mark.parametrize("rank", [0, 1])
def test_an_interrupted_rank_ends_all_and_rank_0_tells(monkeypatch, opened, rank):
    _, _, prompts = opened()
    measured = []

    def work():
        def measure(held):
            measured.append(held.place)
            if held.place == (1, 0):
                signal.raise_signal(signal.SIGTERM)

        return router_lessons.of_each(prompts(), measure)

    with pytest.raises(PiKVError if rank == 0 else SystemExit) as caught:
        on_ranks(monkeypatch, 2, work, told_on=rank)
    assert measured[:5] == [(0, 0), (0, 1), (2, 0), (2, 1), (1, 0)] and (1, 1) not in measured
    assert caught.value.code == 1 if rank else caught.value.message == "interrupted: no router is kept"


def test_a_number_that_is_not_finite_is_told_by_rank_0_alone(monkeypatch, opened):
    _, _, prompts = opened()

    def broken():
        for held in prompts():
            held.features[0, 0, 0] = torch.nan
            yield held

    for rank, error in ((0, PiKVError), (1, SystemExit)):
        with pytest.raises(error):
            on_ranks(monkeypatch, 2, lambda: router_lessons.gather(broken(), None), told_on=rank)


def test_what_rank_0_comes_to_is_everyones_and_so_is_its_error(monkeypatch):
    told = []

    def work(fails):
        assert collectives.num_ranks() == 1  # no sum asks the ranks that wait
        if fails:
            raise PiKVError("the loss is nan at step 3", hint="lower policy_router.lr")
        return {1.0: torch.arange(3)}

    def broadcast(values):
        if collectives.rank() == 0:
            told.append(pickle.dumps(values))
        values[:] = pickle.loads(told[-1])

    monkeypatch.setattr(collectives, "num_started", lambda: 2)
    monkeypatch.setattr(torch.distributed, "broadcast_object_list", broadcast)
    for rank, error in ((0, None), (1, None), (0, PiKVError), (1, SystemExit)):
        monkeypatch.setattr(collectives, "rank", lambda rank=rank: rank)
        if error is None:
            assert torch.equal(collectives.of_first(lambda: work(False))[1.0], torch.arange(3))
            continue
        with pytest.raises(error) as caught:
            collectives.of_first(lambda: work(True))
        assert caught.value.code == 1 if rank else caught.value.hint == "lower policy_router.lr"
    assert collectives.num_ranks() == 2 and len(told) == 2


def words(folder, out, *more):
    given = {"length": 64, "budgets": [0.5, 0.3], "samples": 10, "validation_samples": 6, "eval_samples": 6}
    given |= {"steps": 20, "rounds": 2, "num_strategies": 3, "cache_aware": True, "router": "pikv"}
    settings = [f"start={folder / 'model'}", "dtype=float32", *(f"policy_router.{k}={v}" for k, v in given.items())]
    return ["-m", "pikv_cli", "train", "--out", str(out), *(w for one in [*settings, *more] for w in ("--set", one))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, model, source):
    folder = tmp_path_factory.mktemp("small")
    model.save_pretrained(folder / "model")
    source.save(folder / "model")
    return folder


def test_two_processes_train_the_routers_that_one_does(tmp_path, folder):
    run(1, *words(folder, tmp_path / "one"))
    run(2, *words(folder, tmp_path / "two"))
    one, two = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("one", "two"))
    assert (one["backends"].pop("ranks"), two["backends"].pop("ranks")) == ("1", "2")
    for told in (one, two):
        del told["result"]["tokens_per_s"], told["result"]["calibration"]
    assert one == two
    files = [sorted(x.relative_to(tmp_path / name) for x in (tmp_path / name).rglob("*")) for name in ("one", "two")]
    is_event = [[path for path in paths if "tfevents" in path.name] for paths in files]
    assert len(is_event[0]) == len(is_event[1]) and len(files[0]) == len(files[1])
    compared = []
    for path in set(files[0]) - set(is_event[0]):
        if path.suffix == ".safetensors":
            tensors = [load_file(tmp_path / name / path) for name in ("one", "two")]
            assert tensors[0].keys() == tensors[1].keys()
            assert all(torch.equal(tensors[0][key], tensors[1][key]) for key in tensors[0])
            compared.append(path.suffix)
        elif path.name in ("manifest.json", "choices.png"):
            assert (tmp_path / "one" / path).read_bytes() == (tmp_path / "two" / path).read_bytes()
            compared.append(path.name)
    assert sorted(compared) == [".safetensors", "choices.png", "manifest.json"]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["interrupted", "killed"])
def test_ranks_end_together_with_one_error(tmp_path, folder, how):
    process = torchrun(2, *words(folder, tmp_path / "run", "policy_router.validation_samples=1000000"))
    watch = threading.Timer(120, process.kill)
    watch.start()
    try:
        while "prompts of needles" not in (line := process.stderr.readline()):
            assert line and process.poll() is None
        time.sleep(2)
        workers = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
        if how == "killed":
            os.kill(int(workers[1]), signal.SIGKILL)
        else:
            process.send_signal(signal.SIGTERM)
        errors = process.communicate(timeout=60)[1]
    finally:
        watch.cancel()
    assert process.returncode != 0 and len(workers) == 2
    lines = [line for line in errors.splitlines() if line.startswith("error: ")]
    if how == "killed":
        assert lines == ["error: rank 0: another rank is lost, and the run ends"]
        assert "hint: start again, on any number of ranks" in errors
    else:
        assert lines == ["error: interrupted: no router is kept"]
    assert not (tmp_path / "run").exists()
