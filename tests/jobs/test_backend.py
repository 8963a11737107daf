"""`--backend`: what is forced runs, or one error says why not before any work; nothing falls back in silence."""

import json
import sys
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from kernel_checks import CPU
from operation_recorder import record

from pikv_cli import app
from pikv_core import recipes
from pikv_core.cache import PiKVCache
from pikv_core.cache.backend import attending_by
from pikv_core.compression import CODECS
from pikv_core.compression.base import Codec
from pikv_core.compression.none import Plain
from pikv_core.errors import PiKVError, UsageError
from pikv_core.model import generation
from pikv_core.model.loading import load_model
from pikv_core.model.replayed_step import replaying
from pikv_core.model.steps import feed, step
from pikv_core.runs import Reporter
from pikv_kernels import backends

PROMPT = "f1 f2 k3 v4 f5 f6 f7 k3"


@pytest.fixture(autouse=True)
def _nothing_chosen(monkeypatch):
    monkeypatch.setattr(backends, "_choices", {})


@pytest.fixture
def shelved(monkeypatch):
    """Register a codec that no kernel knows, for one test."""
    monkeypatch.setattr(CODECS, "_classes", dict(CODECS._classes))

    @CODECS.register("shelved")
    @dataclass(frozen=True)
    class Shelved(Codec):
        unit_tokens = 4
        residual = 0

        def encode(self, keys, values, position):
            return {"keys": keys.unflatten(2, (-1, 4)), "values": values.unflatten(2, (-1, 4))}

        def decode(self, encoded, position, dtype):
            return encoded["keys"].flatten(2, 3), encoded["values"].flatten(2, 3)


@pytest.fixture
def pikv(folder, tmp_path, monkeypatch, capsys):
    """Return a function: arguments of a verb → exit code, stdout, stderr; runs in a folder of its own."""
    monkeypatch.chdir(tmp_path)

    def pikv(verb, *arguments):
        asked = ["pikv", verb, "--model", str(folder), *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", asked)
        with pytest.raises(SystemExit) as stop:
            app.main()
        told = capsys.readouterr()
        return stop.value.code, told.out, told.err

    return pikv


def refused(pikv, tmp_path, code, message, *arguments):
    found, out, error = pikv(*arguments)
    lines = error.splitlines()
    assert (found, out) == (code, "") and message in error, error
    assert [line.split(":")[0] for line in lines if line.startswith(("error", "hint"))] == ["error", "hint"]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("backend", ["torch", "numba", pytest.param("triton", marks=CPU)])
def test_what_is_forced_runs_and_is_in_the_result(pikv, tmp_path, backend):
    h2o = ("--policy", "h2o", "--budget", "0.5", "--max-new-tokens", 3, "--json", "--out", tmp_path / "out")
    code, out, error = pikv("generate", PROMPT, *h2o, "--backend", backend)
    assert code == 0, error
    assert (
        f"{backend} for float32 on cpu: forced"
        in json.loads((tmp_path / "out" / "result.json").read_text())["backends"]["attend_tokens"]
    )
    code, free, error = pikv("generate", PROMPT, *h2o[:-1], tmp_path / "free")
    assert json.loads(free)["token_ids"] == json.loads(out)["token_ids"]
    assert backends.newest_forced() is None


def test_a_sweep_is_measured_on_what_is_forced(pikv, tmp_path):
    small = [f"--set={key}" for key in ("context_tokens=96", "num_queries=8", "num_texts=1", "continuation_tokens=4")]
    asked = ("--method", "h2o", "--budget", "0.5", "--tasks", "agreement", "--out", tmp_path / "out", *small)
    code, _, error = pikv("compress", *asked, "--backend", "numba")
    assert code == 0, error
    ran = json.loads((tmp_path / "out" / "result.json").read_text())["backends"]["attend_tokens"]
    assert ran == "numba for float32 on cpu: forced"


@pytest.mark.parametrize("verb", [("generate", PROMPT), ("compress",)])
def test_what_is_no_backend_or_has_no_machine_is_refused(pikv, tmp_path, monkeypatch, verb):
    refused(pikv, tmp_path, 2, "backend: expected 'auto', 'torch', 'numba'", *verb, "--backend", "cuda")
    monkeypatch.setattr("pikv_core.cache.backend.INTERPRETED", False)
    if not torch.cuda.is_available():
        refused(pikv, tmp_path, 2, "backend 'triton' needs a GPU", *verb, "--backend", "triton")
    with pytest.raises(UsageError, match="'numba' needs a CPU"), attending_by("numba", torch.device("cuda")):
        pass


@CPU
def test_codes_that_triton_does_not_read_are_refused_before_any_work(pikv, tmp_path):
    refused(pikv, tmp_path, 2, "codes of 9 bits", "generate", PROMPT, "--backend", "triton", "--codec", "levels")


def test_a_dtype_or_codec_without_a_kernel_is_refused_before_any_work(pikv, tmp_path, monkeypatch, shelved):
    forced = ("--backend", "numba")
    refused(
        pikv, tmp_path, 2, "'numba': no kernel for codec 'shelved'",
        "generate", PROMPT, *forced, "--codec", "shelved",
    )  # fmt: skip
    refused(
        pikv, tmp_path, 2, "'numba': no kernel for codec 'shelved'",
        "compress", *forced, "--method", "shelved,h2o+shelved", "--budget", "0.5",
    )  # fmt: skip
    monkeypatch.setattr(backends, "_choices", {})
    monkeypatch.setattr(backends, "CPU_DTYPES", (torch.uint8,))
    refused(pikv, tmp_path, 2, "'numba': no kernel for float32", "generate", PROMPT, *forced)
    refused(pikv, tmp_path, 2, "'numba': no kernel for float32", "compress", *forced, "--method", "h2o")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_a_graph_needs_a_gpu(pikv, tmp_path):
    h2o = ("--policy", "h2o", "--budget", "16")
    refused(pikv, tmp_path, 2, "--graph needs a GPU, and this run is on 'cpu'", "generate", PROMPT, *h2o, "--graph")


def test_a_batch_is_generated_by_replays_or_says_that_none_was(folder, monkeypatch):
    told = []
    monkeypatch.setattr(Reporter, "status", lambda self, text: told.append(text))
    monkeypatch.setattr(generation, "replaying", partial(replaying, record=record))
    texts = []
    for (
        graph,
        new,
    ) in ((False, 20), (True, 20), (True, 2)):
        flags = {"model": str(folder), "max_new_tokens": new, "graph": graph, "cache.policy": "h2o", "cache.budget": 12}
        recipe = recipes.load("generate", None, (), flags)
        loaded = load_model(str(folder), recipe)
        prompts = [PROMPT, "f1 k3"]
        found, _ = generation.generate_batch(loaded, recipe, prompts, loaded.new_cache(recipe), Reporter(), False)
        texts.append([completion.text for completion in found])
    assert texts[0] == texts[1]
    assert len(told) == 1 and "graph: no step was replayed" in told[0]


def test_calibrating_attends_to_no_new_token(pikv, tmp_path):
    fit = ("--calibrate", "--method", "svd", "--save", "fitted")
    refused(pikv, tmp_path, 2, "backend 'numba' means nothing", "compress", *fit, "--backend", "numba")


def test_what_turns_out_during_a_run_is_one_error(small_model, monkeypatch):
    model = small_model("llama")
    cache = PiKVCache.for_model(model, {"policy": "h2o", "budget": 0.5})
    with attending_by("numba", torch.device("cpu")):
        cache.check_backend(model)
        feed(model, cache, torch.arange(1, 20)[None])
        monkeypatch.setattr(Plain, "attend", Codec.attend)
        with pytest.raises(PiKVError, match="no kernel for codec 'none'") as error:
            step(model, cache, torch.tensor([1]))
    assert error.value.exit_code == 1 and error.value.hint
