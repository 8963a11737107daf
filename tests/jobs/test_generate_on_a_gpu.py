"""`pikv generate` on a GPU: the CPU's tokens, replayed, over tiers, from a prefix store, saved and gone on from."""

import json
import sys

import pytest
from kernel_checks import GPU

from pikv_cli import app
from pikv_core.model import generation

pytestmark = GPU
PROMPT = " ".join(f"f{number} k{number % 7} v{number % 5}" for number in range(100))


@pytest.fixture
def run(folder, tmp_path, monkeypatch, capsys):
    """Return a function: arguments of `generate` → its result; runs in a folder of its own."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        fresh = () if "--resume" in arguments else (PROMPT, "--model", folder, "--max-new-tokens", 32)
        monkeypatch.setattr(sys, "argv", ["pikv", "generate", "--json", *map(str, (*fresh, *arguments))])
        with pytest.raises(SystemExit) as stop:
            app.main()
        told = capsys.readouterr()
        assert stop.value.code == 0, told.err
        return json.loads(told.out)

    return run


@pytest.mark.parametrize("method", ["full", "h2o", "snapkv", "streaming-llm", "keydiff"])
def test_the_tokens_are_those_of_a_cpu_and_of_a_graph(run, method):
    given = ("--policy", method, "--budget", 1.0 if method == "full" else 120)
    expected = run(*given, "--device", "cpu")
    assert run(*given, "--device", "cuda")["token_ids"] == expected["token_ids"]
    if method in ("h2o", "snapkv", "streaming-llm"):
        assert run(*given, "--device", "cuda", "--graph")["token_ids"] == expected["token_ids"]


@pytest.mark.parametrize("more", [(), ("--policy", "quest", "--budget", 64)], ids=["full", "quest"])
def test_tiers_give_the_tokens_of_memory(run, more, tmp_path):
    expected = run(*more)
    for tiers in ("device=200KiB,host=16MiB", f"device=200KiB,host=0,disk={tmp_path}"):
        found = run(*more, "--tiers", tiers, "--set", "cache.tiers.page_tokens=8")
        assert found["token_ids"] == expected["token_ids"] and found["tiers"]["bytes_moved"] > 0


def test_a_prefix_store_gives_the_same_tokens(run):
    expected = run()
    for _ in range(2):
        assert run("--prefix-cache", "store", "--prefix-bytes", "64MiB")["token_ids"] == expected["token_ids"]


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("sampled", [(), ("--temperature", 1, "--seed", 3)], ids=["greedy", "sampled"])
@pytest.mark.parametrize("method", [(), ("--policy", "h2o", "--budget", 100, "--codec", "int4")], ids=["full", "h2o"])
def test_a_run_that_ended_goes_on_token_for_token(run, monkeypatch, method, sampled):
    expected = run(*method, *sampled)
    called = generation._Clock.__call__

    def end(self, *arguments, **named):
        if len(self.times) == 13:
            raise Interrupted
        return called(self, *arguments, **named)

    with monkeypatch.context() as patched:
        patched.setattr(generation._Clock, "__call__", end)
        with pytest.raises(Interrupted):
            run(*method, *sampled, "--save-state", "state", "--save-every", 4)
    assert run("--resume", "state")["token_ids"] == expected["token_ids"]
