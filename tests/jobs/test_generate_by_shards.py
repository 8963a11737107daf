"""`generate --split shards` under torchrun: one process's tokens, counted bytes, and a state that any number goes on."""

import pytest
from test_generate_on_ranks import PROMPT, alone, folder, result, run_all, sent_per_token

RUN = (folder, alone)  # fixtures
GIVEN = ["--policy", "expert-shards", "--top-shards", 2]
GIVEN += ["--set", "cache.policy.newest=24", "--set", "cache.policy.page_tokens=8"]


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_ranks_give_the_tokens_of_one_process_and_save_as_one(folder, tmp_path, alone, count):
    given = [PROMPT, "--model", folder, "--seed", 3, *GIVEN]
    cases = [0, 1]  # temperatures
    runs = []
    for case in cases:
        words = [*given, "--temperature", case, "--max-new-tokens", 25, "--split", "shards", "--save-every", 4]
        runs.append([*words, "--save-state", tmp_path / f"state{case}", "--out", tmp_path / f"run{case}"])
    run_all(count, runs)
    resumed = [
        ["--resume", tmp_path / f"state{case}", "--split", "shards", "--max-new-tokens", 40]
        + ["--out", tmp_path / f"again{case}"]
        for case in cases
    ]
    run_all(6 - count, resumed)  # on more, and on fewer
    for case in cases:
        whole = alone(*given, "--temperature", case, "--max-new-tokens", 40)
        assert result(tmp_path / f"again{case}")["token_ids"] == whole["token_ids"]
        assert alone("--resume", tmp_path / f"state{case}", "--max-new-tokens", 40)["token_ids"] == whole["token_ids"]
        found = result(tmp_path / f"run{case}")
        assert found["token_ids"] == whole["token_ids"][:25]
        assert found["communicated_bytes_per_token"] == sent_per_token("tokens", count)
        assert (found["ranks"], found["split"]) == (count, "shards")
        full = alone(*given, "--temperature", case, "--max-new-tokens", 25)
        assert found["full_bytes"] == full["full_bytes"]
        assert len(found["resident_bytes_by_rank"]) == count
        assert max(found["resident_bytes_by_rank"]) < full["resident_bytes"]
        assert sum(found["resident_bytes_by_rank"]) == found["resident_bytes"]
