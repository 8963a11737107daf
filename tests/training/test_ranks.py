"""Training under torchrun: any number of ranks takes the steps of one, saves, resumes, and ends when one dies."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file
from small_training import COURSE, RECALL

from pikv_core.training.checkpoint import load_checkpoint

SIZES = ["arch=pikv", "num_layers=2", "hidden_size=32", "num_experts=4", "expert_size=24"]
SETTINGS = [
    RECALL,
    *(f"model.{size}" for size in SIZES),
    *COURSE,
    "train.batch_tokens=256",
    "train.max_steps=20",
    "train.stage_steps=8",
    "train.log_every=1",
    "train.checkpoint_every=10",
    "train.lr=0.0003",  # at ten times the rate a rounding becomes another expert for some token within the twenty steps
]
RECIPES = Path(__file__).parents[2] / "recipes" / "train"
ONE_NODE = ["--nnodes", "1", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]


def arguments(*overrides, out=None, resume=None):
    given = [word for setting in (*SETTINGS, *overrides) for word in ("--set", setting)]
    return ["-m", "pikv_cli", "train", *(["--resume", str(resume)] if resume else ["--out", str(out), *given])]


def torchrun(count, *words, node=ONE_NODE):
    command = [sys.executable, "-m", "torch.distributed.run", *node, "--nproc-per-node", str(count), *words]
    return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True)


def run(count, *words):
    """Run to the end, alone for a count of 1; return what it said on stderr."""
    if count == 1:
        done = subprocess.run([sys.executable, *words], env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True)
        assert done.returncode == 0, done.stderr.decode()
        return done.stderr.decode()
    process = torchrun(count, *words)
    _, errors = process.communicate(timeout=180)
    assert process.returncode == 0, errors
    return errors


def curve(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "train/loss" in line]


def assert_same_course(one, other, steps=20):
    """Assert that two runs took the same steps: gradients of the first to 1e-5, losses of all to 1e-3."""
    one, other = curve(one), curve(other)
    assert len(one) == len(other) == steps
    assert other[0]["train/grad_norm"] == pytest.approx(one[0]["train/grad_norm"], rel=1e-5)
    for name in {"train/loss", "train/loss/balance"} & one[0].keys():
        assert other[0][name] == pytest.approx(one[0][name], rel=1e-5)
        for before, after in zip(one, other):
            assert after[name] == pytest.approx(before[name], rel=1e-3)
    for name in {"train/lr", "train/length_tokens", "router/expert_tokens"} & one[0].keys():
        assert other[0][name] == one[0][name]


def assert_same_weights(one, other, tolerance=1e-2):
    """Assert that the weights are the same, by norm: Adam makes much of gradients that are next to none."""
    one, other = (load_file(folder / "model" / "model.safetensors") for folder in (one, other))
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert (other[name] - value).norm() <= tolerance * value.norm(), name


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone") / "run"
    run(1, *arguments(out=folder))
    return folder


def test_two_ranks_that_share_experts_train_as_one_process(tmp_path, alone):
    errors = run(2, *arguments("train.parallel.expert_ranks=2", out=tmp_path / "run"))
    assert_same_course(alone, tmp_path / "run")
    assert_same_weights(alone, tmp_path / "run")
    assert "ranks 2, experts in 1 groups of 2" in errors
    last = curve(tmp_path / "run")[-1]
    tokens = sum(map(sum, last["router/rank_tokens"][0]))
    assert tokens == sum(last["router/expert_tokens"][0]) == 2 * 256
    assert last["router/rank_load_max_over_mean/layer_0"] >= 1
    results = [json.loads((folder / "result.json").read_text())["result"] for folder in (alone, tmp_path / "run")]
    assert results[0]["num_weights"] == results[1]["num_weights"]
    assert results[0]["metrics"] == pytest.approx(results[1]["metrics"], abs=0.05)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "overrides"),
    [
        (2, []),
        (4, ["train.parallel.expert_ranks=2"]),
        (4, ["train.parallel.expert_ranks=4"]),
        (2, ["train.parallel.expert_ranks=2", "model.shared_expert=true", "model.router=balanced"]),
        (2, ["train.parallel.expert_ranks=2", "model.expert_rank=4"]),
        (4, ["model.arch=mixtral"]),
        (2, ["model.arch=llama", "train.optimizer=adamw"]),
        (4, ["train.parallel={expert_ranks: 2, place_every: 3}", "model.router={name: eplb, num_slots: 8}"]),
    ],
    ids=str,
)
def test_any_number_of_ranks_trains_as_one_process(tmp_path, count, overrides):
    run(1, *arguments(*overrides[1:] if "parallel" in str(overrides[:1]) else overrides, out=tmp_path / "alone"))
    run(count, *arguments(*overrides, out=tmp_path / "run"))
    assert_same_course(tmp_path / "alone", tmp_path / "run")
    assert_same_weights(tmp_path / "alone", tmp_path / "run")


FEW_STEPS = ["train.max_steps=3", "train.decay_steps=1", "train.log_every=1", "dtype=float32"]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["digits", "modalities", "series-co2", "classification", "qa"])
def test_every_task_trains_on_two_ranks_as_on_one(tmp_path, recipe):
    given = [word for setting in FEW_STEPS for word in ("--set", setting)]
    words = ["-m", "pikv_cli", "train", "--recipe", str(RECIPES / f"{recipe}.yaml"), *given, "--out"]
    run(1, *words, str(tmp_path / "alone"))
    run(2, *words, str(tmp_path / "run"))
    assert_same_course(tmp_path / "alone", tmp_path / "run", steps=3)


@pytest.mark.slow
def test_a_student_with_a_cache_and_a_teacher_trains_on_two_ranks_as_on_one(tmp_path):
    base = tmp_path / "base"  # a dense one: what is kept and which expert is chosen together are too easily others
    run(1, *arguments("model.arch=llama", "model.ffn_size=48", out=base))
    given = [f"train.init_from={base}", f"train.distill.teacher={base}", "train.distill.hidden=0.1"]
    given += [
        "train.cache={policy: h2o, budget: 0.5}",
        "train.selection_loss=0.5",
        RECALL,
        *COURSE,
        "train.log_every=1",
    ]
    words = ["-m", "pikv_cli", "train", *(word for setting in given for word in ("--set", setting)), "--out"]
    run(1, *words, str(tmp_path / "alone"))
    run(2, *words, str(tmp_path / "run"))
    assert_same_course(tmp_path / "alone", tmp_path / "run", steps=12)


@pytest.mark.slow
def test_two_nodes_of_two_ranks_train_as_one_process(tmp_path, alone):
    words = arguments("train.parallel.expert_ranks=2", out=tmp_path / "run")
    port = _free_port()
    nodes = []
    for rank in range(2):
        where = ["--nnodes", "2", "--node-rank", str(rank), "--master-addr", "127.0.0.1", "--master-port", str(port)]
        nodes.append(torchrun(2, *words, node=where))
    for node in nodes:
        _, errors = node.communicate(timeout=180)
        assert node.returncode == 0, errors
    assert_same_course(alone, tmp_path / "run")


def stop_after(process, folder, step):
    """Send SIGTERM when a step is logged; return what the process said."""
    deadline = time.monotonic() + 120
    while not (folder / "metrics.jsonl").is_file() or len(curve(folder)) < step:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    return process.communicate(timeout=60)[1]


@pytest.mark.slow
@pytest.mark.parametrize(("saved_by", "resumed_by", "expert_ranks"), [(2, 1, 1), (2, 4, 2), (4, 2, 2), (1, 2, 1)])
def test_a_checkpoint_resumes_on_another_number_of_ranks(tmp_path, alone, saved_by, resumed_by, expert_ranks):
    parallel = f"train.parallel.expert_ranks={expert_ranks}"
    folder = tmp_path / "run"
    words = arguments(parallel, out=folder)
    process = torchrun(saved_by, *words) if saved_by > 1 else subprocess.Popen([sys.executable, *words])
    stop_after(process, folder, 4)
    step = load_checkpoint(folder).step
    assert 4 <= step < 20
    run(resumed_by, *arguments(resume=folder))
    assert_same_course(alone, folder)
    assert_same_weights(alone, folder)


@pytest.mark.slow
def test_two_ranks_resumed_are_the_same_to_the_bit(tmp_path):
    words = ["train.parallel={expert_ranks: 2, place_every: 3}", "model.router={name: eplb, num_slots: 8}"]
    run(2, *arguments(*words, out=tmp_path / "whole"))
    process = torchrun(2, *arguments(*words, out=tmp_path / "run"))
    stop_after(process, tmp_path / "run", 5)
    assert load_checkpoint(tmp_path / "run").step < 20
    run(2, *arguments(resume=tmp_path / "run"))
    assert_same_weights(tmp_path / "whole", tmp_path / "run", tolerance=0)


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_run_with_an_error_and_a_checkpoint(tmp_path):
    folder = tmp_path / "run"
    long = ["train.max_steps=100000", "train.decay_steps=1", "train.stage_accuracy=1.0", "train.checkpoint_every=1"]
    process = torchrun(2, *arguments("train.parallel.expert_ranks=2", *long, out=folder))
    deadline = time.monotonic() + 120
    while not any(folder.glob("checkpoint/[0-9]*")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    workers = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    assert len(workers) == 2
    os.kill(int(workers[1]), signal.SIGKILL)
    begun = time.monotonic()
    _, errors = process.communicate(timeout=60)
    assert time.monotonic() - begun < 60
    assert process.returncode == 1
    assert "error: rank 0: another rank is lost, and the run ends" in errors
    assert f"hint: go on with `pikv train --resume {folder}`, on any number of ranks" in errors
    assert load_checkpoint(folder).step >= 1


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        pytest.param(
            "train.parallel.expert_ranks=3",
            "train.parallel.expert_ranks: 2 processes do not divide into groups of 3",
            marks=pytest.mark.slow,
        ),
        ("train.batch_tokens=96", "train.batch_tokens: a step of 3 samples does not divide by 2 ranks"),
    ],
)
def test_what_does_not_divide_is_refused_before_anything_is_written(tmp_path, setting, message):
    process = torchrun(2, *arguments(setting, out=tmp_path / "run"))
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert errors.count(f"error: {message}") == 1 and "hint: " in errors
    assert not (tmp_path / "run").exists()


def _free_port():
    import socket

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
