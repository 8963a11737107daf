"""What a small model computes under the full cache, recorded whole, and the same tokens fed through any other cache."""

import torch

from pikv_core.cache import PiKVCache
from pikv_core.cache.recording import Recorder
from pikv_core.model.steps import feed, prefill, step
from pikv_core.schema import CacheRecipe
from pikv_core.simulation.attention.trace import Header, load
from pikv_core.simulation.attention.writer import AttentionWriter

NUM_PROMPT, NUM_STEPS = 40, 24


def tokens(model, num_tokens=NUM_PROMPT + NUM_STEPS):
    return torch.randint(1, model.config.vocab_size, (1, num_tokens), generator=torch.Generator().manual_seed(5))


def record(model, path, top_p=1.0, dtype="float32", num_queries=None, vectors=True):
    """Feed `tokens` through a full cache that records, one token per step after the prompt; return the trace."""
    ids, writer = tokens(model), AttentionWriter(top_p, dtype)
    cache = PiKVCache.for_model(model, CacheRecipe())
    cache.record(Recorder(writer, num_queries or NUM_PROMPT, vectors))
    logits = [feed(model, cache, ids[:, :NUM_PROMPT])]
    logits += [step(model, cache, ids[:, at]) for at in range(NUM_PROMPT, ids.shape[1])]
    config, layer = model.config, cache.own_layers[0]
    header = Header(
        "small",
        "float32",
        config.num_hidden_layers,
        config.num_attention_heads,
        config.num_key_value_heads,
        layer.dimensions[2],
        tuple(layer.window for layer in cache.own_layers),
        NUM_PROMPT,
        NUM_PROMPT + NUM_STEPS,
        NUM_PROMPT - (num_queries or NUM_PROMPT),
        top_p,
    )
    writer.write(path, header)
    return load(path), torch.cat(logits)


def run(model, recipe):
    """Feed `tokens` through a cache in the model; yield layer 0's stored positions per head after each step."""
    ids = tokens(model)
    cache = PiKVCache.for_model(model, recipe)
    prefill(model, cache, ids[:, :NUM_PROMPT], future=ids[:, NUM_PROMPT:])
    yield held(cache)
    for at in range(NUM_PROMPT, ids.shape[1]):
        step(model, cache, ids[:, at])
        yield held(cache)


def held(cache, layer=0):
    """Return the sorted positions that each head of a layer stores."""
    return [sorted(at for at in head if at >= 0) for head in cache.own_layers[layer].positions()[0].tolist()]
