"""A recorded decode step, done again on the same tensors, is the step that would have been run."""

import pytest
import torch
import transformers
from operation_recorder import record
from small_models import CONFIGS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pikv_core.cache import PiKVCache
from pikv_core.cache.static import has_static_steps
from pikv_core.errors import UsageError
from pikv_core.model.replayed_step import ReplayedStep, replaying
from pikv_core.model.steps import feed, prefill, step
from pikv_core.scheduling import POLICIES
from pikv_kernels.backends import forced

NAMES = [name for name in POLICIES.names() if name != "oracle"]  # which has to be told what comes
STATIC = [name for name in NAMES if has_static_steps(POLICIES[name])]


def states(cache):
    """Return what every layer holds and counts, statistics too."""
    held = []
    for layer in cache.own_layers:
        stores = [lane.tail for lane in layer.lanes]
        held += [x for store in stores for x in (*store.decoded(), store.position, *store.columns().values())]
        held += [layer.num_seen, layer.seen.here, torch.tensor([layer.seen_length, layer.resident_bytes])]
    return held


@pytest.mark.parametrize("allocation", ["uniform", "ada-kv"])
@pytest.mark.parametrize("name", STATIC)
def test_replayed_steps_are_the_steps(small_model, name, allocation):
    model, ids = small_model("llama"), torch.randint(1, 97, (2, 56), generator=torch.Generator().manual_seed(0))
    cache = PiKVCache.for_model(model, {"policy": name, "budget": 24, "allocation": allocation})
    prefill(model, cache, ids[:, :40])
    expected = cache.fork()
    decode = ReplayedStep(model, cache, record)
    with forced("torch"):
        for at in range(40, 56):
            found, other = decode(ids[:, at]), step(model, expected, ids[:, at])
            assert torch.equal(found, other), at
        assert decode.num_replayed > 10
        assert torch.equal(step(model, cache, ids[:, 0]), step(model, expected, ids[:, 0]))
        for one, two in zip(states(cache), states(expected), strict=True):
            assert torch.equal(one, two)


def test_rows_of_a_padded_batch_are_replayed_too(small_model):
    model, ids = small_model("llama"), torch.randint(1, 97, (2, 60), generator=torch.Generator().manual_seed(0))
    cache = PiKVCache.for_model(model, {"policy": "h2o", "budget": 16})
    feed(model, cache, ids[:, :40], torch.arange(40) >= torch.tensor([[15], [0]]))
    expected, decode = cache.fork(), ReplayedStep(model, cache, record)
    with forced("torch"):
        for at in range(40, 60):
            assert torch.equal(decode(ids[:, at]), step(model, expected, ids[:, at])), at
    assert cache.own_layers[0].num_seen.tolist() == [45, 60] and decode.num_replayed > 10


@pytest.mark.parametrize("sampled", [False, True])
def test_transformers_generate_goes_on_by_replays(small_model, sampled):
    model, ids = small_model("llama"), torch.arange(1, 41)[None]

    def text(cache):
        torch.manual_seed(3)
        options = {"do_sample": sampled, "top_k": 20 if sampled else None, "repetition_penalty": 1.3}
        return model.generate(ids, past_key_values=cache, max_new_tokens=40, **options)

    caches = [PiKVCache.for_model(model, {"policy": "h2o", "budget": 50}) for _ in range(2)]
    with forced("torch"):
        expected = text(caches[0])
        with replaying(model, caches[1], record) as decode:
            found = text(caches[1])
    assert torch.equal(found, expected) and decode.num_replayed > 20
    assert "forward" not in vars(model) and caches[1].get_seq_length() == caches[0].get_seq_length()


def test_a_replay_asks_the_model_nothing(small_model, monkeypatch):
    model, ids = small_model("llama"), torch.arange(1, 61)[None]
    cache = PiKVCache.for_model(model, {"policy": "h2o", "budget": 16})
    feed(model, cache, ids[:, :40])
    decode = ReplayedStep(model, cache, record)
    with forced("torch"):
        for at in range(40, 45):
            decode(ids[:, at])
        held = [x.data_ptr() for layer in cache.own_layers for x in layer.lanes[0].tail._all()]
        monkeypatch.setattr(model, "forward", None)
        for at in range(45, 60):
            decode(ids[:, at])
    assert decode.num_replayed > 14
    assert held == [x.data_ptr() for layer in cache.own_layers for x in layer.lanes[0].tail._all()]
    assert cache.get_seq_length() == 60 and cache.num_stored == [16] * len(cache.layers)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in STATIC])
def test_policies_whose_steps_differ_are_refused_by_name(small_model, name):
    policy = POLICIES[name]
    if policy.calibrated:
        pytest.skip("refused before, without its calibration")
    budget = 24 if policy.takes_budget else 1.0
    options = {"name": name, "dense_layers": 0} if name == "quest" else {"name": name}
    cache = PiKVCache.for_model(small_model("llama"), {"policy": options, "budget": budget})
    with pytest.raises(UsageError, match=f"policy '{name}'") as error:
        ReplayedStep(small_model("llama"), cache, record)
    assert all(static in error.value.hint for static in STATIC)


@pytest.mark.parametrize(
    "arch, recipe, message",
    [
        ("llama", {"budget": 0.5}, "a budget of 0.5 of the tokens seen"),
        ("llama", {"codec": "int8"}, "codec 'int8'"),
        ("llama", {"allocation": "pyramid"}, "allocation 'pyramid'"),
        ("llama", {"policy": "streaming-llm", "rerotate": True}, "rerotate"),
        ("mistral", {}, "a sliding window"),
    ],
)
def test_what_else_moves_is_refused(small_model, arch, recipe, message):
    cache = PiKVCache.for_model(small_model(arch), {"policy": "h2o", "budget": 16, **recipe})
    with pytest.raises(UsageError, match=message) as error:
        ReplayedStep(small_model(arch), cache, record)
    assert error.value.hint


class Transfers(TorchDispatchMode):
    """Collect the operations that take a tensor of the CPU's and give one elsewhere."""

    def __init__(self):
        super().__init__()
        self.found, self.count = [], 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        made = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        self.count += 1
        if any(x.is_cpu and x.dim() for x in given) and any(not x.is_cpu for x in (*given, *made)):
            self.found.append(str(operation))
        return result


@pytest.mark.skipif(
    tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 10),
    reason="older transformers ask torch whether the device meta has autocast, which it refuses",
)
@pytest.mark.parametrize("name", ["snapkv", *(name for name in STATIC if POLICIES[name].is_static)])
def test_nothing_is_copied_from_the_host_in_a_static_step(name):
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(CONFIGS["llama"]()).eval()
        token = torch.zeros(1, 1, dtype=torch.int64)
    cache = PiKVCache.for_model(model, {"policy": name, "budget": 6})
    for layer in cache.own_layers:
        layer.is_recorded = True  # tensors without content have no numbers to ask for
    with torch.no_grad():
        for _ in range(9):
            model(input_ids=token, position_ids=token, past_key_values=cache)
        assert cache.is_static
        with Transfers() as transfers:
            model(input_ids=token, position_ids=token, past_key_values=cache)
    assert transfers.count > 100 and transfers.found == []
    with Transfers() as transfers:
        torch.arange(3).to("meta")
    assert transfers.found == ["aten._to_copy.default"]


def test_the_recorder_refuses_what_a_graph_cannot_hold():
    x = torch.ones(3)
    for asks in (lambda: x.sum().item(), lambda: x.nonzero(), lambda: bool(x.all()), lambda: x[x > 0]):
        with pytest.raises(RuntimeError, match="asks for a value"):
            record(asks)


def test_the_recorder_keeps_results_where_they_were():
    x, seen = torch.zeros(2, 2), []
    again = record(lambda: seen.append((x.add_(1)[0] * 2 + x.t()[1]).sum(0)))
    assert seen[0] == 6
    again()
    assert seen[0] == 12 and len(seen) == 1
