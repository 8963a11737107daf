"""Quest reads pages by their bounds: against a brute-force choice, and bounds against the keys themselves."""

import pytest
import torch
from single_layer import single_layer

from pikv_core.cache.page_bounds import PageBounds
from pikv_core.compression.int8 import Int8
from pikv_core.observation import LayerRun
from pikv_core.scheduling.quest import Quest

B, H, G, D = 2, 4, 2, 16


def brute_force(query, keys, values, num_pages, page):
    """query [R,D], keys and values [S,D]: attention over the pages with the largest summed bounds."""
    pages = [slice(start, min(start + page, len(keys))) for start in range(0, len(keys), page)]
    bound = [sum(torch.maximum(q * keys[p].amax(0), q * keys[p].amin(0)).sum().item() for q in query) for p in pages]
    chosen = sorted(range(len(pages)), key=lambda index: -bound[index])[:num_pages]
    read = torch.cat([torch.arange(pages[index].start, pages[index].stop) for index in chosen])
    weights = (query @ keys[read].T * D**-0.5).softmax(-1)
    return weights @ values[read]


@pytest.mark.parametrize("prompt", [100, 96, 90])
def test_reads_the_pages_with_the_largest_bounds(prompt):
    generator = torch.Generator().manual_seed(0)
    layer = single_layer(Quest(dense_layers=0), 48)
    keys, values = (torch.randn(B, G, prompt, D, generator=generator) for _ in range(2))
    layer.update(keys, values)
    layer.attend(torch.randn(B, H, prompt, D, generator=generator), D**-0.5)
    for _ in range(20):
        query = torch.randn(B, H, 1, D, generator=generator)
        new = [torch.randn(B, G, 1, D, generator=generator) for _ in range(2)]
        keys, values = torch.cat([keys, new[0]], 2), torch.cat([values, new[1]], 2)
        layer.update(*new)
        output = layer.attend(query, D**-0.5)
        for b in range(B):
            for g in range(G):
                rows = query[b].view(G, H // G, D)[g]
                expected = brute_force(rows, keys[b, g], values[b, g], 3, 16)
                assert (output[b].view(G, H // G, D)[g] - expected).abs().max() < 1e-5
    assert layer.num_stored == prompt + 20


def test_dense_layers_and_full_budgets_read_everything():
    for layer in (
        single_layer(Quest(), 0.25, run=LayerRun(1, 4)),
        single_layer(Quest(), 1.0, run=LayerRun(3, 4)),
    ):
        keys, values = torch.randn(2, B, G, 200, D).unbind(0)
        layer.update(keys[:, :, :199], values[:, :, :199])
        layer.attend(torch.randn(B, H, 199, D), D**-0.5)
        query = torch.randn(B, H, 1, D)
        layer.update(keys[:, :, 199:], values[:, :, 199:])
        output = layer.attend(query, D**-0.5)
        rows = query.view(B, G, H // G, D)
        expected = (rows @ keys.mT * D**-0.5).softmax(-1) @ values
        assert (output.view(B, G, H // G, D) - expected).abs().max() < 1e-5


def test_quest_over_codes_reads_units_and_the_residual():
    generator = torch.Generator().manual_seed(1)
    codec = Int8(group=16, residual=8)
    layer = single_layer(Quest(dense_layers=0), 64, codec)
    keys, values = (torch.randn(B, G, 200, D, generator=generator) for _ in range(2))
    layer.update(keys, values)
    layer.attend(torch.randn(B, H, 200, D, generator=generator), D**-0.5)
    query = torch.randn(B, H, 1, D, generator=generator)
    new = [torch.randn(B, G, 1, D, generator=generator) for _ in range(2)]
    layer.update(*new)
    output = layer.attend(query, D**-0.5)
    stored_keys, stored_values, position = layer.retrieve()
    body = layer.lanes[0].body.num_slots
    assert body == 192 and position[0, 0].tolist() == list(range(201))
    for b in range(B):
        for g in range(G):
            rows = query[b].view(G, H // G, D)[g]
            pages = keys[b, g, :body].view(-1, 16, D)
            bound = sum((q.clamp(min=0) * pages.amax(1) + q.clamp(max=0) * pages.amin(1)).sum(-1) for q in rows)
            chosen = bound.topk(64 // 16 - 1).indices
            read = torch.cat([(chosen[:, None] * 16 + torch.arange(16)).flatten(), torch.arange(body, 201)])
            weights = (rows @ stored_keys[b, g, read].T * D**-0.5).softmax(-1)
            expected = weights @ stored_values[b, g, read]
            assert (output[b].view(G, H // G, D)[g] - expected).abs().max() < 1e-5


@pytest.mark.parametrize("chunks", [[1, 63, 64, 65], [1000], [7] * 9])
def test_bounds_are_the_keys_extremes(chunks):
    bounds = PageBounds(16)
    keys = torch.randn(B, G, sum(chunks), D)
    is_token = torch.rand(B, G, sum(chunks)) > 0.1
    at = 0
    for T in chunks:
        bounds.append(keys[:, :, at : at + T], is_token[:, :, at : at + T])
        at += T
        for page in range(bounds.num_pages):
            own = slice(16 * page, min(16 * page + 16, at))
            held = keys[:, :, own][is_token[:, :, own]]
            if len(held):
                assert bounds.highest[:, :, page].max() == held.max()
                assert bounds.lowest[:, :, page].min() == held.min()
    assert torch.isfinite(bounds.lowest).all()
