"""What a run tells while it trains: metrics.jsonl and TensorBoard say the same."""

import json

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2
from training.test_train import InterruptedAt, assert_same_end, train_to

from pikv_core.errors import PiKVError
from pikv_core.training.router_log import read_load

MOE = ["model.arch=pikv", "train.log_every=4", "dtype=float32"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("logged") / "run"
    router = ["model.router.capacity_factor=0.5", "model.router=pikv"]
    result = train_to(folder, *MOE, *router)
    events = EventAccumulator(str(folder / "tb"), {"images": 0, "scalars": 0, "tensors": 0})
    events.Reload()
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return result, lines, events


def test_every_number_of_metrics_jsonl_is_in_tensorboard(run):
    _, lines, events = run
    assert [line["step"] for line in lines] == [4, 8, 12, 16, 18]
    for line in lines:
        for tag, value in line.items():
            if tag == "step" or isinstance(value, list):
                continue
            told = {event.step: event.value for event in events.Scalars(tag)}
            assert told[line["step"]] == pytest.approx(value, rel=1e-6)


def test_losses_are_told_apart_and_add_up(run):
    for line in run[1][:-1]:
        parts = {tag: value for tag, value in line.items() if tag.startswith("train/loss/")}
        assert set(parts) == {"train/loss/answers", "train/loss/balance", "train/loss/z"}
        assert sum(parts.values()) == pytest.approx(line["train/loss"], rel=1e-5)
        assert line["train/grad_norm"] > 0 and line["train/lr"] > 0 and "train/tokens_per_s" in line


def test_every_layer_tells_its_routing(run):
    _, lines, _ = run
    for line in lines[:-1]:
        tokens = np.array(line["router/expert_tokens"])
        assert tokens.shape == (2, 4) and (tokens.sum(1) == 2 * 128).all()
        for layer, row in enumerate(tokens):
            assert line[f"router/load_max_over_mean/layer_{layer}"] == pytest.approx(row.max() / row.mean())
            assert line[f"router/load_cv/layer_{layer}"] == pytest.approx(row.std() / row.mean())
            assert 0 < line[f"router/router_entropy/layer_{layer}"] <= np.log(4) + 1e-6
            assert line[f"router/dropped_tokens/layer_{layer}"] >= 128
            assert 0 <= line[f"router/expert_hit_rate/layer_{layer}"] <= 1


def test_the_load_over_time_is_drawn(run):
    assert set(run[2].Tags()["images"]) == {"router/load/layer_0", "router/load/layer_1"}
    [picture] = run[2].Images("router/load/layer_1")
    assert picture.encoded_image_string.startswith(b"\x89PNG") and (picture.width, picture.height) == (600, 250)


def test_hyperparameters_stand_beside_the_final_metrics(run):
    result, _, events = run
    data = plugin_data_pb2.HParamsPluginData()
    data.ParseFromString(events.summary_metadata["_hparams_/session_start_info"].plugin_data.content)
    told = data.session_start_info.hparams
    assert told["model.arch"].string_value == "pikv" and told["train.lr"].number_value == 3e-3
    assert told["model.router.capacity_factor"].number_value == 0.5
    data.ParseFromString(events.summary_metadata["_hparams_/experiment"].plugin_data.content)
    assert {metric.name.tag for metric in data.experiment.metric_infos} == {f"test/{name}" for name in result.metrics}


def test_a_dense_model_tells_of_no_router(tmp_path):
    train_to(tmp_path / "run")
    assert "router" not in (tmp_path / "run" / "metrics.jsonl").read_text()
    assert read_load(tmp_path / "run" / "metrics.jsonl")[0] == []


def test_what_is_told_after_a_resume_between_two_lines_is_the_same(tmp_path):
    train_to(tmp_path / "whole", *MOE)
    with pytest.raises(PiKVError, match="interrupted at step 7"):
        train_to(tmp_path / "cut", *MOE, reporter=InterruptedAt(7))
    train_to(tmp_path / "cut", *MOE, resume=True)
    assert_same_end(tmp_path / "whole", tmp_path / "cut")
