"""Switch: candidates see what they would see alone, and the choice changes by recall, slowly."""

import pytest
import torch
from scheduling.synthetic import World, show
from single_layer import single_layer

from pikv_core.components import Component, build
from pikv_core.errors import UsageError
from pikv_core.observation import LayerRun, Rows
from pikv_core.scheduling import POLICIES
from pikv_core.scheduling.base import Evictor, Tokens
from pikv_core.scheduling.switch import Switch

FIT = ["h2o", "keydiff", "knorm", "lfu", "lru", "random", "snapkv", "streaming-llm", "tova", "window"]
G, R, D = 2, 2, 8


def policy(name):
    return build(POLICIES, Component(name))


@pytest.mark.parametrize("name", FIT)
@pytest.mark.parametrize("chunk", [5, 100])
def test_a_candidate_observes_what_it_would_alone(name, chunk):
    """The prompt is longer than any candidate's window; one that decides once sees nothing after it."""
    world = World(steps=(90, 1, 1, 1, 6, 1, 1))
    other = "tova" if name == "h2o" else "h2o"
    seen = show(Switch(policies=(other, name)), world, world.layer_runs()[0], chunk)
    alone = policy(name)
    steps = 5 if alone.decides_once else None  # the last prompt is the one of 6 tokens
    expected = show(alone, world, world.layer_runs()[0], chunk, steps=steps)
    assert set(seen) == {"newest", "prompt_end", *(f"{x}.{c}" for x in (other, name) for c in policy(x).columns)}
    for column in alone.columns:
        assert torch.equal(seen[f"{name}.{column}"], expected[column])


def layers_after(evictors, budget=12, num_steps=25):
    """Return the positions [B,G,S] that each evictor's layer holds after the same prompt and steps."""
    held = []
    for evictor in evictors:
        generator = torch.Generator().manual_seed(3)
        layer = single_layer(evictor, budget)
        for num_new in (40, *[1] * num_steps):
            query = 3 * torch.randn(2, G * R, num_new, D, generator=generator)
            key, value = torch.randn(2, 2, G, num_new, D, generator=generator)
            layer.update(key, value)
            layer.attend(query, D**-0.5)
        held.append((layer.positions().sort(dim=-1).values, layer.run))
    return held


@pytest.mark.parametrize("name", FIT)
def test_with_an_unreachable_margin_it_is_its_first_policy(name):
    """A candidate that decides once is compared on the prompt, where it decides."""
    other = "tova" if name == "h2o" else "h2o"
    evictors = Switch(policies=(name, other), margin=1.0), policy(name)
    (switched, run), (alone, _) = layers_after(evictors, num_steps=0 if evictors[1].decides_once else 25)
    assert torch.equal(switched, alone) and run.events == []


def test_a_candidate_that_decides_once_keeps_later_tokens_and_drops_the_oldest_of_them():
    for num_steps in (5, 9, 25):
        ((held, _),) = layers_after([Switch(policies=("snapkv", "h2o"), margin=1.0)], 12, num_steps)
        later = range(40, 40 + num_steps)
        for row in held.flatten(0, 1).tolist():
            assert [position for position in row if position >= 40] == list(later[-12:])


def feed(evictor, run, attention, columns, capacity):
    """Show one decode step with `attention` [S] for all heads, score, and return the score [1,1,S]."""
    S = len(attention)
    position = torch.arange(S)[None, None]
    probs = torch.tensor(attention).view(1, 1, 1, 1, S)
    query = torch.full((1, 1), S - 1)
    evictor.observe(columns, Rows(probs, query, position, torch.full((1, 1, 1), S), True, 0, run))
    return evictor.score(
        Tokens(
            position,
            columns,
            torch.tensor([S]),
            torch.tensor([[capacity]]),
            torch.zeros(1, 1, dtype=torch.long),
            torch.zeros(1, dtype=torch.long),
            lambda: torch.zeros(1, 1, S, D),
            lambda: torch.zeros(1, 1, S, D),
            run,
        )
    )


MIDDLE = [0.1, 0.1, 0.0, 0.0, 0.5, 0.0, 0.1, 0.2]  # streaming keeps .5 of it in 5 tokens, TOVA all
NEWEST = [0.3, 0.2, 0.0, 0.0, 0.0, 0.1, 0.2, 0.2]  # streaming keeps all in 5 tokens, TOVA too


def run_steps(evictor, steps):
    run, columns = LayerRun(5, 6, num_kv_heads=1), {name: torch.zeros(1, 1, 8) for name in evictor.columns}
    return run, [feed(evictor, run, attention, columns, 5) for attention in steps]


@pytest.mark.parametrize("patience", [1, 3, 8])
def test_it_switches_after_as_many_better_steps_as_its_patience(patience):
    evictor = Switch(policies=("streaming-llm", "tova"), patience=patience)
    run, scores = run_steps(evictor, [MIDDLE] * patience)
    assert run.events == []
    run, scores = run_steps(evictor, [MIDDLE] * (patience + 4))
    (event,) = run.events
    recall = event.pop("recall")
    assert event == {"event": "switch", "layer": 5, "step": 8, "from": "streaming-llm", "to": "tova"}
    assert recall == pytest.approx({"streaming-llm": 0.5, "tova": 1.0}, abs=1e-6)
    dropped = [score[0, 0].argmin().item() for score in scores]
    assert dropped == [2] * patience + [2] * 4
    assert [score[0, 0, 4].item() for score in scores] == [4.0] * patience + [0.5] * 4


def test_recall_is_the_running_mean_of_what_would_have_been_kept():
    evictor = Switch(policies=("streaming-llm", "tova"), patience=3, decay=0.75)
    run, _ = run_steps(evictor, [NEWEST, NEWEST, MIDDLE, MIDDLE, MIDDLE, MIDDLE])
    recall = 1.0
    for _ in range(3):
        recall = 0.75 * recall + 0.25 * 0.5
    assert run.events[0]["recall"] == pytest.approx({"streaming-llm": recall, "tova": 1.0}, abs=1e-6)


@pytest.mark.parametrize(
    "options, steps",
    [
        ({"patience": 3, "decay": 0.0}, [MIDDLE, MIDDLE, NEWEST] * 5),  # never better three times in a row
        ({"patience": 1, "margin": 0.6}, [MIDDLE] * 10),  # never better by so much
        ({"patience": 1}, [NEWEST] * 10),
    ],
)
def test_it_does_not_switch_for_less(options, steps):
    run, _ = run_steps(Switch(policies=("streaming-llm", "tova"), **options), steps)
    assert run.events == []


def test_it_switches_there_and_back():
    evictor = Switch(policies=("h2o", "streaming-llm"), patience=2, decay=0.0, margin=0.01)
    old = [0.0, 0.0, 0.9, 0.0, 0.0, 0.0, 0.05, 0.05]
    run, _ = run_steps(evictor, [old] * 5 + [NEWEST] * 6 + [old] * 6)
    assert [(event["from"], event["to"]) for event in run.events] == [
        ("h2o", "streaming-llm"),
        ("streaming-llm", "h2o"),
    ]
    for event in run.events:
        assert event["recall"][event["to"]] > event["recall"][event["from"]] + 0.01


def test_all_heads_of_a_layer_count_together_even_if_they_are_stored_apart():
    """Two lanes of one head each, scored one after the other, are one step."""
    evictor = Switch(policies=("streaming-llm", "tova"), patience=2)
    run = LayerRun(0, 1, num_kv_heads=2)
    lanes = [{name: torch.zeros(1, 1, 8) for name in evictor.columns} for _ in range(2)]
    position, head = torch.arange(8)[None, None], torch.zeros(1, 1, dtype=torch.long)
    keys = lambda: torch.zeros(1, 1, 8, D)  # noqa: E731
    choices = []
    for _ in range(4):
        for columns, attention in zip(lanes, (MIDDLE, NEWEST)):
            probs = torch.tensor(attention).view(1, 1, 1, 1, 8)
            count = torch.full((1, 1, 1), 8)
            evictor.observe(columns, Rows(probs, torch.full((1, 1), 7), position, count, True, 0, run))
        for columns in lanes:
            five, seen = torch.tensor([[5]]), torch.tensor([8])
            evictor.score(Tokens(position, columns, seen, five, head, head[:, 0], keys, keys, run))
        choices.append(len(run.events))
    assert choices == [0, 0, 1, 1]
    assert run.events[0]["recall"] == pytest.approx({"streaming-llm": 0.75, "tova": 1.0}, abs=1e-6)


@pytest.mark.parametrize(
    "policies, message",
    [
        (["h2o"], "two different policies or more"),
        (["h2o", "h2o"], "two different policies or more"),
        (["h2o", "quest"], "'quest' drops no tokens"),
        (["h2o", "full"], "'full' drops no tokens"),
        (["kvzip", "h2o"], "'kvzip' has to be shown more than the prompt"),
        (["duo-attention", "h2o"], "'duo-attention' needs a calibration"),
        (["fastv", "h2o"], "'fastv' has budgets of its own"),
        (["expected-attention", "h2o"], "'expected-attention' learns from queries"),
        (["switch", "h2o"], "'switch' is a switch itself"),
        (["h2o", "snapvk"], "unknown policy 'snapvk'"),
    ],
)
def test_what_cannot_be_a_candidate_is_refused(policies, message):
    with pytest.raises(UsageError, match=message) as error:
        build(POLICIES, Component("switch", {"policies": policies}))
    assert "h2o" in error.value.hint


def test_it_takes_all_policies_that_keep_what_they_score():
    names = [name for name in POLICIES.names() if issubclass(POLICIES[name], Evictor)]
    assert set(FIT) <= set(names)
    Switch(policies=tuple(FIT))
