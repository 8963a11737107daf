"""`generate --prefix-cache`: the same text, fewer tokens computed, and hits that `simulate-cache` finds in its log."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pikv_cli import app

ROOT = Path(__file__).parents[2]
WORDS = [f"f{number}" for number in range(200)]


@pytest.fixture
def pikv(tmp_path, monkeypatch, capsys):
    """Return a function: arguments of `pikv` → exit code, the result, stderr; runs in a folder of its own."""
    monkeypatch.chdir(tmp_path)

    def run(verb, *arguments):
        monkeypatch.setattr(sys, "argv", ["pikv", verb, "--json", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            app.main()
        told = capsys.readouterr()
        return stop.value.code, json.loads(told.out) if told.out else None, told.err

    return run


def session(num_prompts, seed=0):
    """Return prompts of turns of a few conversations, which begin alike."""
    chance = random.Random(seed)
    talks = [WORDS[:20] for _ in range(3)]
    prompts = []
    for _ in range(num_prompts):
        talk = chance.choice(talks)
        talk += chance.choices(WORDS, k=chance.randrange(3, 15))
        prompts.append(" ".join(talk))
        if len(talk) > 90:
            talk[20:] = []
    return prompts


def write(path, prompts):
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    return path


def test_a_budget_without_a_store_is_refused(pikv):
    code, _, told = pikv("generate", "a", "--model", "none", "--prefix-bytes", "4MiB")
    assert code == 2 and "give prefix_cache a folder" in told


@pytest.mark.parametrize("policy", ["lru", "s3fifo"])
def test_hits_and_text(folder, pikv, tmp_path, policy):
    prompts = write(tmp_path / "prompts.jsonl", session(10))
    given = ["--model", folder, "--prompts", prompts, "--max-new-tokens", 2]
    _, plain, _ = pikv("generate", *given)
    given += ["--prefix-cache", "store", "--prefix-policy", policy, "--set", "prefix.block_tokens=8"]
    code, found, _ = pikv("generate", *given, "--prefix-bytes", "82KiB")
    assert code == 0
    prefix = found["prefix"]
    _, again, _ = pikv("generate", *given)  # by the store's own budget
    assert plain["prefix"] is None
    for one in (found, again):
        assert [x["token_ids"] for x in one["completions"]] == [x["token_ids"] for x in plain["completions"]]
        assert one["prefix"]["block_hits"] == sum(x["block_hits"] for x in one["completions"])
        assert one["prefix"]["reused_tokens"] > 0
    assert prefix["evictions"] > 0
    files = [file.stat().st_size for file in (tmp_path / "store" / "blocks").iterdir()]
    assert sum(files) == again["prefix"]["resident_bytes"] <= 82 * 1024
    assert prefix["capacity_blocks"] == 82 * 1024 // prefix["block_bytes"] == 12
    asked = ["--policy", policy, "--capacity", prefix["capacity_blocks"]]
    _, simulated, _ = pikv("simulate-cache", "store/requests.jsonl", *asked)
    row = simulated["results"][0]
    both = {name: prefix[name] + again["prefix"][name] for name in ("block_hits", "block_accesses")}
    assert both == {name: row[name] for name in both}
    assert again["prefix"]["evictions"] == row["evictions"]
    _, warm, _ = pikv("simulate-cache", "store/requests.jsonl", *asked, "--set", "warm_up=0.5")
    for name in ("block_hits", "block_accesses", "block_hit_ratio", "token_hit_ratio"):
        assert warm["results"][0][name] == pytest.approx(again["prefix"][name], rel=1e-12)


def test_a_run_saves_its_state_beside(folder, pikv):
    prompt = session(1)[0]
    given = [prompt, "--model", folder, "--max-new-tokens", 9]
    _, plain, _ = pikv("generate", *given)
    given += ["--prefix-cache", "store", "--set", "prefix.block_tokens=8", "--policy", "full"]
    for state in ("first", "second"):
        _, found, _ = pikv("generate", *given, "--save-state", state)
        assert found["token_ids"] == plain["token_ids"]
    assert found["prefix"]["block_hits"] == found["prefix"]["block_accesses"] > 0
    _, more, _ = pikv("generate", "--resume", "second", "--max-new-tokens", 12)
    assert more["token_ids"][:9] == plain["token_ids"]
    assert more["prefix"] is None


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        (["--batch-size", 2], "batch_size"),
        (["--record-attention", "x.safetensors"], "record_attention"),
        (["--graph"], "graph"),
        (["--save-state", "store"], "save_state in the same folder"),
        (["--shards", 4], "expected the name of a policy beside 'shards'"),
        (["--prefix-policy", "belady"], "belady"),
        (["--prefix-bytes", "many"], "bytes such as"),
        (["--policy", "h2o", "--budget", "0.5"], "h2o"),
    ],
)
def test_what_does_not_go_together_is_refused(folder, pikv, asked, why):
    code, _, told = pikv("generate", "f1 f2", "--model", folder, "--prefix-cache", "store", *asked)
    assert code == 2
    assert why in told


@pytest.mark.slow
def test_a_killed_run_leaves_a_store_that_later_ones_trust(folder, pikv, tmp_path):
    prompts = write(tmp_path / "prompts.jsonl", session(60, seed=1))
    given = ["--model", str(folder), "--prompts", str(prompts), "--max-new-tokens", "2"]
    _, plain, _ = pikv("generate", *given)
    given += ["--prefix-cache", str(tmp_path / "store"), "--set", "prefix.block_tokens=8", "--prefix-bytes", "96KiB"]
    log, chance = tmp_path / "store" / "requests.jsonl", random.Random(2)
    for number in range(4):
        before = log.stat().st_size if log.exists() else 0
        words = [sys.executable, "-m", "pikv_cli", "generate", *given, "--out", str(tmp_path / f"killed{number}")]
        running = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        while not (log.exists() and log.stat().st_size > before):
            assert running.poll() is None
            time.sleep(0.01)
        time.sleep(chance.random() * 0.3)
        running.send_signal(signal.SIGKILL)
        told = running.communicate()[1].decode()
        assert "missing" not in told, told
    code, found, told = pikv("generate", *given)
    assert code == 0, told
    assert "missing" not in told
    assert [x["token_ids"] for x in found["completions"]] == [x["token_ids"] for x in plain["completions"]]
    _, simulated, _ = pikv("simulate-cache", log, "--capacity", found["prefix"]["capacity_blocks"], "--policy", "lru")
    assert simulated["results"][0]["evictions"] == found["prefix"]["evictions"]
    kept = found["prefix"]
    assert kept["lost_blocks"] == 0
    assert len(list((tmp_path / "store" / "blocks").iterdir())) == kept["resident_blocks"] <= kept["capacity_blocks"]
