"""`generate` over tiers: the tokens of a run in memory, and a report of what lay where and what was moved."""

import json
import sys

import pytest

from pikv_cli import app

PROMPT = " ".join(f"f{number} k{number % 7} v{number % 5}" for number in range(100))


@pytest.fixture
def generate(folder, tmp_path, monkeypatch, capsys):
    """Return a function: arguments of `generate` → exit code, the result, stderr; runs in a folder of its own."""
    monkeypatch.chdir(tmp_path)

    def generate(*arguments):
        monkeypatch.setattr(sys, "argv", ["pikv", "generate", "--json", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            app.main()
        told = capsys.readouterr()
        return stop.value.code, json.loads(told.out) if told.out else None, told.err

    return lambda *arguments: generate(*arguments, *([] if "--resume" in arguments else ["--model", folder]))


def test_the_tokens_are_those_of_memory_and_the_report_is_of_the_run(generate, tmp_path):
    run = (PROMPT, "--max-new-tokens", 12)
    _, memory, _ = generate(*run)
    assert memory["tiers"] is None
    small = ("--set", "cache.tiers.page_tokens=8")
    for arguments in (
        ("--policy", "flexgen", *small),
        ("--tiers", f"device=60KiB,host=40KiB,disk={tmp_path}", *small),
        ("--tiers", "device=60KiB,host=0,cxl.bandwidth_gb_s=20,cxl.latency_us=5", *small),
    ):
        code, result, told = generate(*run, *arguments)
        assert code == 0 and result["token_ids"] == memory["token_ids"], told
        tiers = result["tiers"]
        assert sum(tiers["bytes"].values()) == result["resident_bytes"]
        assert tiers["bytes_moved"] == sum(tiers["bytes_read"].values()) > 0
        limit = tiers["device_limit_bytes"]
        assert limit is None or tiers["device_peak_decoding_bytes"] <= limit == 60 * 1024 < result["full_bytes"] / 3
        assert tiers["simulated"] == (["cxl"] if "cxl" in str(arguments) else [])


def test_a_saved_run_goes_on_over_tiers(generate):
    run = (PROMPT, "--tiers", "device=60KiB", "--set", "cache.tiers.page_tokens=8", "--temperature", 1)
    _, whole, _ = generate(*run, "--max-new-tokens", 24)
    code, _, told = generate(*run, "--max-new-tokens", 9, "--save-state", "state", "--save-every", 4)
    assert code == 0, told
    code, later, told = generate("--resume", "state", "--max-new-tokens", 24)
    assert code == 0 and later["token_ids"] == whole["token_ids"], told
    assert later["tiers"]["device_peak_decoding_bytes"] <= 60 * 1024
    code, _, told = generate("--resume", "state", "--tiers", "device=1MiB")
    assert code == 2 and "--resume takes the recipe of its state, not --tiers" in told


def test_what_cannot_be_is_refused_before_anything_runs(generate):
    for arguments, text in (
        (("--tiers", "device"), "--tiers: expected key=value, got 'device'"),
        (("--tiers", "device=much"), "expected bytes such as '64MiB', got 'much'"),
        (("--policy", "h2o", "--budget", 0.5, "--tiers", "device=60KiB"), "policy 'h2o' drops tokens"),
        (("--tiers", "device=60KiB", "--record-attention", "trace.safetensors"), "in one memory records"),
        (("--set", "cache.tiers.shelf=1"), "unknown key"),
    ):
        code, _, told = generate(PROMPT, *arguments)
        assert code == 2 and text in told, told
