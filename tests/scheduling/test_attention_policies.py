"""Policies that score by attention, against plain loops in float64, each row and head on its own."""

import math

import pytest
import torch
from scheduling import references
from scheduling.synthetic import World, make_tokens, observe_and_score, show

from pikv_core.scheduling.h2o import H2O
from pikv_core.scheduling.lfu import LFU
from pikv_core.scheduling.lru import LRU
from pikv_core.scheduling.snapkv import SnapKV
from pikv_core.scheduling.tova import TOVA

WORLDS = {
    "padded": World(),
    "eight heads": World(padding=(3, 0, 9), num_heads=2, group=4, seed=1),
    "decoding": World(padding=(1,), steps=(2, *[1] * 30), num_heads=3, group=1, seed=2),
}


@pytest.fixture(params=WORLDS)
def world(request):
    return WORLDS[request.param]


def rows_and_heads(world):
    """Yield (row, head, padding, attention lists [R][q][s] without padding, steps of the row)."""
    for row, pad in enumerate(world.padding):
        for head in range(world.num_heads):
            attention = world.attention[row, head, :, pad:, pad:].tolist()
            yield row, head, pad, attention, (world.steps[0] - pad, *world.steps[1:])


def check_values(score, world, reference):
    for row, head, pad, attention, steps in rows_and_heads(world):
        expected = torch.tensor(reference(attention, steps), dtype=torch.float64)
        torch.testing.assert_close(score[row, head, pad:].double(), expected, rtol=1e-5, atol=1e-6)


def check_ranks(score, world, reference):
    """Check that scores order the tokens as the reference's pairs do, with no ties."""
    for row, head, pad, attention, steps in rows_and_heads(world):
        pairs = reference(attention, steps)
        expected = sorted(range(len(pairs)), key=pairs.__getitem__)
        own = score[row, head, pad:]
        assert own.argsort().tolist() == expected
        assert len(own.unique()) == len(own)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 1.0])
def test_h2o(world, share):
    score = observe_and_score(H2O(share), world, capacity=10)
    check_values(score, world, lambda attention, steps: references.h2o(attention, 10, share))


def test_tova(world):
    score = observe_and_score(TOVA(), world)
    for row, pad in enumerate(world.padding):
        expected = references.tova(world.attention[row, :, :, pad:, pad:].tolist())
        for head in range(world.num_heads):
            own = score[row, head, pad:].double()
            torch.testing.assert_close(own, torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-6)


def test_tova_scores_heads_with_different_tokens_each_by_its_own_attention():
    world = World(padding=(0,))
    (first, *_) = world.layer_runs()
    rows = {}

    class Spy(TOVA):
        def observe(self, columns, seen):
            rows["last"] = seen

    show(Spy(), world, first)
    seen = rows["last"]
    different = seen.position.clone()
    different[:, 1] = different[:, 1].flip(-1)
    columns = {"attention": torch.zeros(seen.position.shape)}
    TOVA().observe(columns, type(seen)(**{**vars(seen), "position": different}))
    torch.testing.assert_close(columns["attention"], seen.probs[:, :, :, -1].mean(2))


def test_tova_keeps_what_it_saw_where_a_row_got_only_padding():
    world = World(padding=(0, 0))
    (run, *_) = world.layer_runs()
    before = show(TOVA(), world, run, steps=2)["attention"].clone()
    rows = {}

    class Spy(TOVA):
        def observe(self, columns, seen):
            rows["last"] = seen

    show(Spy(), world, run, steps=2)
    seen = rows["last"]
    seen.query_position[1] = -1
    seen.probs[1] = 0
    after = before.clone()
    TOVA().observe({"attention": after[:, :, : seen.probs.shape[-1]]}, seen)
    assert torch.equal(after, before) and before[1].any()


@pytest.mark.parametrize("tau", [0.5, 1.0, 3.0])
def test_lru(world, tau):
    score = observe_and_score(LRU(tau), world)
    check_ranks(score, world, lambda attention, steps: references.lru(attention, steps, tau))


def test_lru_takes_a_prompt_by_position():
    world = World(padding=(0,), steps=(30,))
    score = observe_and_score(LRU(), world)
    assert torch.equal(score[0, 0].argsort(), torch.arange(30))


@pytest.mark.parametrize("tau", [0.5, 1.0, 3.0])
def test_lfu(world, tau):
    score = observe_and_score(LFU(tau), world)
    check_ranks(score, world, lambda attention, steps: references.lfu(attention, tau))


def test_lfu_ranks_counts_and_positions_that_float32_cannot_add():
    world = World(padding=(0,), steps=(4,), num_heads=1)
    (run, *_) = world.layer_runs()
    tokens = make_tokens(world, run, {"num_uses": torch.tensor([[[4095.0, 4095.0, 4096.0, 0.0]]])})
    tokens.position.copy_(torch.tensor([2**20, 2**20 - 1, 0, 5]))
    assert LFU().score(tokens)[0, 0].argsort().tolist() == [3, 1, 0, 2]


@pytest.mark.parametrize("pooling", ["avg", "max"])
@pytest.mark.parametrize(("window", "kernel"), [(1, 1), (4, 5), (7, 3), (6, 4), (64, 5)])
@pytest.mark.parametrize("capacity", [3, 10])
def test_snapkv(pooling, window, kernel, capacity):
    policy = SnapKV(window, kernel, pooling)
    for group in (1, 4):
        world = World(padding=(0, 6, 11), steps=(27,), group=group)
        score = observe_and_score(policy, world, capacity)

        def reference(attention, steps):
            return references.snapkv(attention, steps[-1], capacity, window, kernel, pooling)

        check_values(score, world, reference)


def test_snapkv_pools_neighbours_in_the_text_not_in_memory():
    world = World(padding=(0, 4), steps=(40,))
    policy = SnapKV(window=5, kernel=7)
    slots = torch.randperm(40, generator=torch.Generator().manual_seed(5))
    score = observe_and_score(policy, world)
    shuffled = observe_and_score(policy, world, slots=slots)
    real = (world.position >= 0)[:, None, slots].expand_as(score)
    torch.testing.assert_close(shuffled[real], score[:, :, slots][real])


def test_snapkv_votes_anew_at_every_prompt():
    world = World(padding=(0,), steps=(20, 15))
    (run, *_) = world.layer_runs()
    votes = show(SnapKV(window=6), world, run, chunk=4)["votes"]
    expected = world.attention[:, :, :, -6:].mean(2).sum(2).float()
    torch.testing.assert_close(votes, expected)
    assert math.isclose(votes.sum().item(), 2 * 6, rel_tol=1e-5)


def test_snapkv_counts_nothing_of_a_slot_that_was_emptied():
    world = World(padding=(0,), steps=(30,))
    (run, *_) = world.layer_runs()
    policy = SnapKV(window=5, kernel=3)
    votes = show(policy, world, run)["votes"]
    tokens = make_tokens(world, run, {"votes": votes})
    tokens.position[:, :, 7] = -1
    left = torch.tensor([s for s in range(30) if s != 7])
    without = make_tokens(world, run, {"votes": votes[:, :, left]}, slots=left)
    torch.testing.assert_close(policy.score(tokens)[:, :, left], policy.score(without))
