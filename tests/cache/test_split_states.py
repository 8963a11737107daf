"""A state that ranks saved is one process's: any number of ranks goes on from it, split in any way."""

import pytest
import torch
from thread_ranks import on_ranks

from pikv_core.cache import PiKVCache, stream
from pikv_core.cache.ranks.log import Follower, RankChanges
from pikv_core.cache.ranks.snapshot import part_of
from pikv_core.cache.snapshot import restore
from pikv_core.model.steps import prefill, step

PROMPT, SAVED, END = 80, 126, 150  # tokens
INT8 = {"name": "int8", "group": 32, "residual": 16}
METHODS = {
    "full": ({}, ("heads", "tokens")),
    "full+int8": ({"codec": INT8}, ("heads", "tokens")),
    "streaming-llm": ({"policy": "streaming-llm", "budget": 53}, ("heads", "tokens")),
    "h2o+int8": ({"policy": "h2o", "budget": 0.4, "codec": INT8}, ("heads",)),
    "expected-attention": ({"policy": "expected-attention", "budget": 60}, ("heads",)),
    "quest": ({"policy": {"name": "quest", "dense_layers": 1}, "budget": 64}, ("heads",)),
}
QUICK = [("full+int8", "tokens"), ("h2o+int8", "heads")]
CASES = [(name, split) for name, (_, splits) in METHODS.items() for split in splits]
CASES = [pytest.param(*case, marks=[] if case in QUICK else pytest.mark.slow) for case in CASES]


def feed(model, cache, ids, writer=None, start=0):
    """Feed ids [1,T], of which the first 80 are the prompt; save every 7 tokens; return the logits of each token.

    The log begins anew once, as it does when the changes have outgrown the state.
    """
    logits = []
    if start == 0:
        logits.append(prefill(model, cache, ids[:, :PROMPT]))
        start = PROMPT
    for end in range(start + 1, ids.shape[1] + 1):
        logits.append(step(model, cache, ids[:, end - 1]))
        if isinstance(writer, stream.Writer) and end == SAVED - 26:
            writer._written_bytes = 2**40
        if writer is not None and end % 7 == 0:
            writer.save(cache, ids[:, :end], {}, {})
    return torch.cat(logits)


@pytest.mark.parametrize(("name", "split"), CASES)
def test_any_number_of_ranks_goes_on(small_model, tmp_path, name, split):
    model, (recipe, splits) = small_model("llama"), METHODS[name]
    ids = torch.randint(1, 97, (1, END), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        whole = feed(model, PiKVCache.for_model(model, recipe), ids)

    def save(wire):
        cache = PiKVCache.for_model(model, recipe).share(split, wire, model)
        changes = RankChanges(wire, split)
        writer = Follower(changes) if wire.rank else stream.Writer(str(tmp_path / "state"), {}, None, changes)
        with writer:
            feed(model, cache, ids[:, : SAVED + 5], writer)
        return cache

    made = on_ranks(2, save)
    saved = stream.read(str(tmp_path / "state"))
    assert saved.tokens.shape == (1, SAVED)
    assert len([*(tmp_path / "state").glob("*.safetensors")]) == 4  # begun anew

    alone = PiKVCache.for_model(model, recipe)
    restore(alone, saved.cache, model.device)
    assert alone.peak_bytes >= sum(cache.resident_bytes for cache in made) * 0.9
    with torch.no_grad():
        torch.testing.assert_close(feed(model, alone, ids, start=SAVED), whole[SAVED - END :], atol=2e-4, rtol=2e-4)

    for other, count in [(other, 2) for other in splits] + [("tokens", 3)] * ("tokens" in splits):

        def go_on(wire, other=other):
            cache = PiKVCache.for_model(model, recipe).share(other, wire, model)
            restore(cache, part_of(saved.cache, cache.own_layers[0].split, wire.count), model.device)
            return feed(model, cache, ids, start=SAVED)

        for logits in on_ranks(count, go_on):
            torch.testing.assert_close(logits, whole[SAVED - END :], atol=2e-4, rtol=2e-4)
