"""Models told in transformers' architectures: the same logits in a process without us, or every reason why not."""

import json
import os
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file
from small_models import CONFIGS, SMALL
from small_training import train_small
from transformers import AutoModelForCausalLM

import pikv_core.model as ours
from pikv_cli.app import main
from pikv_core.errors import PiKVError, UsageError
from pikv_core.jobs import export as job
from pikv_core.moe import ROUTERS, create_moe_router
from pikv_core.recipes import dump, load
from pikv_core.runs import Run
from pikv_core.training.export import export

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 32,
}
ONE_EXPERT = {"num_experts": 1, "num_experts_per_tok": 1}
# Told by one who has no PiKV at all: from another folder, without a path, with the weights' own classes.
STRANGER = """
import sys, torch, transformers
folder, ids, out, family = sys.argv[1:]
model = getattr(transformers, family).from_pretrained(folder, dtype=torch.float32).eval()
with torch.no_grad():
    output = model(torch.load(ids))
ours = [name for name in sys.modules if name.split(".")[0] in ("pikv_core", "pikv_cli", "pikv_kernels")]
assert not ours and type(model).__module__.startswith("transformers.models."), ours
torch.save(output.logits if "logits" in output else torch.stack([output.start_logits, output.end_logits]), out)
"""


def our_model(cls="PiKVForCausalLM", **given):
    """Return a random model whose weights, norms, biases and buffers all matter."""
    config = ours.PiKVConfig(**{**SMALL, "num_experts": 4, "num_experts_per_tok": 2, **given})
    return drawn(getattr(ours, cls)(config))


def drawn(model):
    torch.manual_seed(1)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.5 if weight.dim() == 1 else weight.shape[-1] ** -0.5)
    for layer in model.base_model.layers:
        gate = getattr(layer.mlp, "gate", None)
        if isinstance(gate, torch.nn.Module) and hasattr(gate, "weight"):
            torch.nn.init.normal_(gate.weight, std=0.5)
        for name, buffer in gate.named_buffers() if hasattr(layer.mlp, "experts") else ():
            buffer.uniform_(1, 2).mul_(torch.arange(1, len(buffer) + 1) if name == "hits" else 1)
    return model.eval()


def logits(model, num_tokens=64):
    ids = torch.arange(1, 1 + 2 * num_tokens).view(2, num_tokens) * 31 % SMALL["vocab_size"]
    with torch.no_grad():
        output = model(ids)
    return output.logits if "logits" in output else torch.stack([output.start_logits, output.end_logits])


def assert_same(told, model):
    expected = logits(model)
    assert expected.std() > 0.05
    torch.testing.assert_close(logits(told), expected, rtol=0, atol=1e-5)


def refused(model, to):
    with pytest.raises(UsageError) as caught:
        export(model, to)
    return caught.value


@pytest.mark.parametrize(
    ("to", "given"),
    [
        ("mixtral", {}),
        ("mixtral", {"head_dim": 32, "expert_rank": 3, "expert_alpha": 6.0}),
        ("mixtral", {"rope_parameters": LLAMA3_ROPE, "rms_norm_eps": 1e-3, "tie_word_embeddings": True}),
        ("mixtral", ONE_EXPERT),
        ("qwen3_moe", {"qk_norm": True}),
        ("qwen3_moe", {"qk_norm": True, "qk_bias": True, "num_experts_per_tok": 3, "head_dim": 32}),
        ("qwen3_moe", {"qk_norm": True, "qk_bias": True, "vo_bias": True, "expert_rank": 3}),
        ("llama", ONE_EXPERT),
        ("llama", {**ONE_EXPERT, "qk_bias": True, "rope_parameters": LLAMA3_ROPE}),
        ("llama", {**ONE_EXPERT, "vo_bias": True, "expert_rank": 3}),
    ],
    ids=str,
)
@pytest.mark.parametrize("head", ["CausalLM", "SequenceClassification", "QuestionAnswering"])
def test_an_exported_model_gives_the_same_logits(to, given, head):
    model = our_model(f"PiKVFor{head}", **given)
    if given.get("tie_word_embeddings"):
        model.tie_weights()
    told = export(model, to)
    assert type(told).__module__.startswith(f"transformers.models.{to}.") and type(told).__name__.endswith(head)
    assert_same(told, model)


@pytest.mark.parametrize("to", ["mixtral", "qwen3_moe"])
def test_the_way_back_is_the_same_to_the_bit(to):
    model = our_model(qk_norm=to == "qwen3_moe", balance_loss=0.07)
    again = export(export(model, to), "pikv")
    expected = model.state_dict()
    assert set(again.state_dict()) == set(expected)
    assert all(torch.equal(weight, expected[name]) for name, weight in again.state_dict().items())
    assert again.config.balance_loss == 0.07


@pytest.mark.parametrize("norm_topk_prob", [True, False])
def test_qwen3_moe_becomes_ours_where_its_weights_are_renormalised(norm_topk_prob):
    sizes = {**SMALL, "moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 16}
    config = transformers.Qwen3MoeConfig(norm_topk_prob=norm_topk_prob, attention_bias=True, **sizes)
    theirs = drawn(AutoModelForCausalLM.from_config(config))
    if norm_topk_prob:
        assert_same(export(theirs, "pikv"), theirs)
    else:
        assert "router of 'qwen3_moe' weighs experts without renormalising" in refused(theirs, "pikv").message


def test_mixtral_with_one_expert_is_a_llama():
    config = transformers.MixtralConfig(num_local_experts=1, **{**SMALL, "num_experts_per_tok": 1})
    theirs = drawn(AutoModelForCausalLM.from_config(config))
    assert_same(export(theirs, "llama"), theirs)


# Which routers, with which options and buffers as drawn, are what transformers computes, and which are not.
STANDARD = [
    "base",
    "eplb",
    "flex",
    "mixture",
    {"name": "fast", "gate": "naive"},
    {"name": "fast", "gate": "noisy"},
    {"name": "fast", "gate": "gshard"},
    {"name": "hierarchical", "num_groups": 1},
    {"name": "pikv", "hit_weight": 0.0, "latency_weight": 0.0},
]
PLAIN = [{"name": "fast", "gate": "switch"}]
OTHER = [
    "balanced",
    {"name": "balanced", "score": "softmax"},
    {"name": "hierarchical", "num_groups": 2},
    {"name": "hierarchical", "num_groups": 2, "top_groups": 2},
    "pikv",
    {"name": "pikv", "hit_weight": 0.0},
    {"name": "pikv", "latency_weight": 0.0},
    {"name": "time"},
]


def with_router(router, **given):
    options = {"name": router} if isinstance(router, str) else dict(router)
    name = options.pop("name")
    given = {"num_experts_per_tok": 1 if options.get("gate") == "switch" else 2, "shared_expert": False, **given}
    return our_model(router=name, router_options=options, **given)


def test_every_router_is_here():
    named = {router if isinstance(router, str) else router["name"] for router in [*STANDARD, *PLAIN, *OTHER]}
    assert named == set(ROUTERS.names())


@pytest.mark.parametrize("router", STANDARD, ids=str)
def test_a_standard_router_is_mixtrals(router):
    model = with_router(router)
    assert_same(export(model, "mixtral"), model)


@pytest.mark.parametrize("router", [*PLAIN, "time"], ids=str)
def test_plain_weights_are_told_by_qwen3_moe_alone(router):
    model = with_router(router, qk_norm=True)
    for layer in model.model.layers if router == "time" else ():
        torch.nn.init.zeros_(layer.mlp.gate.time_weight)
    told = export(model, "qwen3_moe")
    assert told.config.norm_topk_prob is False
    assert_same(told, model)
    message = refused(model, "mixtral").message
    assert "it norms queries and keys" in message and "without renormalising" in message


@pytest.mark.parametrize("router", OTHER, ids=str)
def test_another_router_is_refused_by_name_and_does_compute_something_else(router):
    model = with_router(router)
    error = refused(model, "mixtral")
    assert (
        f"its router '{model.config.router}" in error.message
        and error.hint == "it takes a model with model.router: base"
    )
    base = our_model()
    parts = model.state_dict()
    base.load_state_dict({name: parts[name] for name in base.state_dict()})
    assert (logits(base) - logits(model)).abs().max() > 1e-3


@pytest.mark.parametrize(
    "router",
    [
        {"name": "balanced", "score": "softmax"},
        "pikv",
    ],
    ids=str,
)
def test_where_every_expert_is_chosen_none_can_be_preferred(router):
    model = with_router(router, num_experts_per_tok=4)
    assert_same(export(model, "mixtral"), model)


@pytest.mark.parametrize("router", [name for name in ROUTERS.names() if name != "mixture"])
def test_any_router_of_one_expert_is_a_llama(router):
    model = with_router(router, **ONE_EXPERT)
    assert_same(export(model, "llama"), model)


@pytest.mark.parametrize("name", ROUTERS.names())
def test_what_a_router_says_of_its_weights_is_what_it_does(name):
    torch.manual_seed(0)
    router = create_moe_router(name, 16, 6, 2).eval()
    x = torch.randn(500, 16)
    routing = router(x)
    weights, experts = (x @ router.weight.T).softmax(-1).topk(2, dim=-1)
    plain = torch.zeros(500, 6).scatter(1, experts, weights)
    got = torch.zeros(500, 6).scatter(1, routing.experts, routing.weights)
    says = {"plain": plain, "renormalised": plain / plain.sum(-1, keepdim=True)}
    same = [kind for kind, expected in says.items() if torch.allclose(got, expected, atol=1e-6)]
    if router.top_k_weights is not None:
        assert same == [router.top_k_weights]
    else:
        assert not same or name == "pikv"  # which prefers none before it has measured anything


def test_every_reason_is_named_at_once_with_what_would_do():
    model = our_model(router="balanced", shared_expert=True, qk_bias=True, qk_norm=True)
    error = refused(model, "mixtral")
    lines = error.message.splitlines()
    assert len(lines) == 4 and all(line.startswith("export.to: 'mixtral' cannot tell this model: ") for line in lines)
    assert "6 biases of attention are not zero, model.layers.0.self_attn.q_proj.bias among them" in error.message
    assert "it norms queries and keys" in error.message
    assert "its router 'balanced' weighs experts otherwise" in error.message
    assert "it has a shared expert" in error.message
    wanted = ["attention_bias: false", "qk_norm: false", "router: base", "shared_expert: false"]
    assert error.hint == "it takes a model with " + ", ".join(f"model.{name}" for name in wanted)


def test_the_hint_names_another_architecture_where_one_will_do():
    biased = our_model(qk_bias=True, qk_norm=True)
    assert refused(biased, "mixtral").hint == "--to qwen3_moe can tell it"
    assert_same(export(biased, "qwen3_moe"), biased)
    assert refused(our_model(**ONE_EXPERT, qk_bias=True), "mixtral").hint == "--to llama can tell it"
    assert refused(our_model(), "qwen3_moe").hint == "--to mixtral can tell it"
    assert "no weights of such norms" in refused(our_model(), "qwen3_moe").message


def test_biases_of_zero_count_as_none():
    model = our_model(qk_bias=True, vo_bias=True)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(".bias"):
                weight.zero_()
    assert_same(export(model, "mixtral"), model)


@pytest.mark.parametrize(
    ("kind", "to", "message"),
    [
        ("llama", "mixtral", "not all of its layers have experts"),
        ("pikv", "llama", "it has 4 experts"),
        ("qwen3", "llama", "it is a 'qwen3'"),
        ("gemma2", "mixtral", "it is a 'gemma2'"),
    ],
)
def test_what_has_no_place_is_refused(kind, to, message):
    model = AutoModelForCausalLM.from_config(CONFIGS[kind]())
    error = refused(model, to)
    assert message in error.message and error.hint


def test_a_sliding_window_is_refused():
    config = transformers.MixtralConfig(num_local_experts=4, sliding_window=24, **SMALL)
    assert "a sliding window" in refused(AutoModelForCausalLM.from_config(config), "pikv").message


@pytest.mark.parametrize("cls", ["PiKVForImageClassification", "PiKVForModalityClassification"])
def test_heads_without_tokens_are_refused_by_name(cls):
    model = getattr(ours, cls)(ours.PiKVConfig(**{**SMALL, "vocab_size": 0, "num_experts": 4}))
    assert f"a {cls} cannot be told" in refused(model, "mixtral").message


def test_the_configuration_is_complete(tmp_path):
    model = our_model(
        balance_loss=0.05,
        rope_parameters=LLAMA3_ROPE,
        rms_norm_eps=1e-4,
        bos_token_id=3,
        eos_token_id=[5, 6],
        max_position_embeddings=99,
    )
    model.generation_config.temperature = 0.5
    model.generation_config.do_sample = True
    export(model, "mixtral").save_pretrained(tmp_path)
    told = json.loads((tmp_path / "config.json").read_text())
    expected = {
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "router_aux_loss_coef": 0.05,
        "sliding_window": None,
        "rms_norm_eps": 1e-4,
        "bos_token_id": 3,
        "eos_token_id": [5, 6],
        "pad_token_id": 0,
        "max_position_embeddings": 99,
        "head_dim": 16,
        "rope_theta": 5000.0,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
    }
    assert {name: told[name] for name in expected} == expected
    assert transformers.AutoConfig.from_pretrained(tmp_path).rope_parameters == LLAMA3_ROPE
    assert transformers.GenerationConfig.from_pretrained(tmp_path).temperature == 0.5
    export(our_model(qk_norm=True), "qwen3_moe").save_pretrained(tmp_path / "qwen")
    told = json.loads((tmp_path / "qwen" / "config.json").read_text())
    expected = {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [], "use_sliding_window": False}
    assert {name: told[name] for name in expected} == expected
    assert told["moe_intermediate_size"] == 96 and told["attention_bias"] is False


def test_weights_keep_their_dtype_and_merged_ones_are_float32(tmp_path):
    for given, expected in (({}, torch.bfloat16), ({"expert_rank": 2}, torch.float32)):
        stored = tmp_path / str(expected)
        our_model(**given).bfloat16().save_pretrained(stored)
        model = AutoModelForCausalLM.from_pretrained(stored, dtype="auto").eval()
        assert model.dtype == torch.bfloat16
        told = export(model, "mixtral")
        assert {weight.dtype for weight in told.parameters()} == {expected}
        assert_same(told.float(), model.float())
        result = run_export(tmp_path / f"{expected}-run", f"start={stored}", "export.to=mixtral")
        assert f"torch.{result.dtype}" == str(expected) and result.max_logit_difference <= 1e-5
        assert AutoModelForCausalLM.from_pretrained(result.model, dtype="auto").dtype == expected


def run_export(folder, *given):
    recipe = load("train", None, given, {"out": str(folder)})
    return job.run(recipe, Run(recipe))


CASES = [
    ("mixtral", "PiKVForCausalLM", {"expert_rank": 2, "router": "eplb"}, "AutoModelForCausalLM"),
    ("qwen3_moe", "PiKVForCausalLM", {"qk_norm": True, "qk_bias": True}, "AutoModelForCausalLM"),
    ("llama", "PiKVForCausalLM", {**ONE_EXPERT, "qk_bias": True}, "AutoModelForCausalLM"),
    ("llama", "PiKVForQuestionAnswering", ONE_EXPERT, "AutoModelForQuestionAnswering"),
    ("mixtral", "PiKVForSequenceClassification", {"num_labels": 5}, "AutoModelForSequenceClassification"),
]


@pytest.mark.parametrize(
    ("to", "cls", "given", "family"),
    [
        pytest.param(*case, id=f"{case[0]}-{case[1]}", marks=[] if "Causal" in case[1] else pytest.mark.slow)
        for case in CASES
    ],
)
def test_a_process_that_never_imports_us_gets_the_same_logits(to, cls, given, family, tmp_path):
    model = our_model(cls, **given)
    model.save_pretrained(tmp_path / "ours")
    result = run_export(tmp_path / "run", f"start={tmp_path / 'ours'}", f"export.to={to}")
    assert result.max_logit_difference <= 1e-5 and result.architecture == to and result.dtype == "float32"
    files = list((tmp_path / "run" / "model").glob("*.safetensors"))
    assert result.weights_bytes == sum(file.stat().st_size for file in files) > 4 * result.num_weights
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    ids = torch.randint(SMALL["vocab_size"], (2, 50), generator=torch.Generator().manual_seed(4))
    torch.save(ids, elsewhere / "ids.pt")
    path = [place for place in os.environ.get("PYTHONPATH", "").split(os.pathsep) if place and "pikv" not in place]
    stranger = subprocess.run(
        [sys.executable, "-c", STRANGER, result.model, "ids.pt", "logits.pt", family],
        cwd=elsewhere,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
        capture_output=True,
        text=True,
    )
    assert stranger.returncode == 0, stranger.stderr
    with torch.no_grad():
        output = model(ids)
    expected = output.logits if "logits" in output else torch.stack([output.start_logits, output.end_logits])
    assert expected.std() > 0.05
    torch.testing.assert_close(torch.load(elsewhere / "logits.pt"), expected, rtol=0, atol=1e-5)


def test_a_trained_run_is_exported_with_its_tokenizer_and_task(tmp_path):
    trained = train_small(tmp_path / "trained", "model.arch=pikv", "model.attention_bias=false")
    result = run_export(tmp_path / "told", f"start={tmp_path / 'trained'}", "export.to=mixtral")
    before, after = ({file.name for file in (tmp_path / run / "model").iterdir()} for run in ("trained", "told"))
    assert before == after and {"tokenizer.json", "tokenizer_config.json", "recall.json"} < after
    model = AutoModelForCausalLM.from_pretrained(result.model)
    assert model.config.model_type == "mixtral"
    ids = torch.arange(2, 30)[None]
    theirs = AutoModelForCausalLM.from_pretrained(trained.model)
    torch.testing.assert_close(model(ids).logits, theirs(ids).logits, rtol=0, atol=1e-5)
    stored = json.loads((tmp_path / "told" / "result.json").read_text())["result"]
    assert stored["max_logit_difference"] == result.max_logit_difference
    assert load("train", tmp_path / "told" / "recipe.yaml").export.to == "mixtral"
    again = run_export(tmp_path / "again", f"start={tmp_path / 'told'}", "export.to=mixtral")  # a re-save
    assert again.max_logit_difference == 0.0
    one, other = (load_file(f"{folder}/model.safetensors") for folder in (result.model, again.model))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_other_logits_are_an_error_and_leave_nothing(tmp_path, monkeypatch):
    our_model().save_pretrained(tmp_path / "ours")
    monkeypatch.setattr(ROUTERS["balanced"], "top_k_weights", "renormalised")  # a router that does not tell the truth
    our_model(router="balanced").save_pretrained(tmp_path / "ours")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(PiKVError, match="gives logits other than") as caught:
        run_export(tmp_path / "run", f"start={tmp_path / 'ours'}", "export.to=mixtral")
    assert caught.value.exit_code == 1
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--export-only"], "--export-only and --to go together"),
        (["--to", "mixtral", "--start", "ours"], "--export-only and --to go together"),
        (["--export-only", "--to", "mixtral"], "give --start RUN"),
        (["--export-only", "--to", "mixtrall", "--start", "ours"], "did you mean 'mixtral'"),
        (["--export-only", "--to", "qwen3_moe", "--start", "ours"], "it does not norm queries and keys"),
        (["--export-only", "--to", "mixtral", "--start", "ours", "--recipe", "train.yaml"], "model, train: nothing"),
        (["--export-only", "--to", "mixtral", "--start", "ours", "--dtype", "bfloat16"], "keeps the stored dtype"),
        (["--export-only", "--to", "mixtral", "--start", "ours", "--set", "duo_gates={}"], "are 2 runs"),
        (["--export-only", "--to", "mixtral", "--resume", "ours"], "no run to go on with"),
        (["--start", "ours"], "--export-only --to NAME exports that model"),
    ],
    ids=str,
)
def test_a_mistake_on_the_command_line_writes_nothing(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.yaml").write_text("model: {arch: pikv}\ntrain: {lr: 0.1}\n")
    our_model().save_pretrained(tmp_path / "ours")
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["pikv", "train", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    told = capsys.readouterr()
    assert stopped.value.code == 2 and told.out == ""
    assert told.err.startswith("error: ") and message in told.err and "hint: " in told.err
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["ours", "train.yaml"]


def test_the_command_line_names_the_run_and_prints_the_result(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    our_model().save_pretrained(tmp_path / "ours")
    asked = ["pikv", "train", "--export-only", "--to", "mixtral", "--start", "ours"]
    (tmp_path / "there").mkdir()
    for more in (["--json"], [], ["--out", "there"], ["--out", "some/where"], ["--check"]):
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", [*asked, *more])
        with pytest.raises(SystemExit) as stopped:
            main()
        out = capsys.readouterr().out
        assert stopped.value.code == 0
        if more == ["--json"]:
            assert json.loads(out)["model"] == "runs/export-1/model"
        elif not more:
            assert out.startswith("model: runs/export-2/model, mixtral, ") and "logits differ by" in out
    assert "export:\n  to: mixtral\n" in out and "\ntrain:" not in out
    for folder in ("there", "some/where"):
        assert sorted(entry.name for entry in (tmp_path / folder).iterdir()) == ["model", "recipe.yaml", "result.json"]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["ours", "runs", "some", "there"]


def test_recipes_of_training_say_nothing_of_exports():
    assert "export" not in dump(load("train"))
    assert "export" not in dump(load("train", None, ["start=DIR", "duo_gates={}"]))
