"""`generate --split shards` under torchrun: one process's tokens, bytes counted, a state for any number."""

import pytest
from test_generate_on_ranks import PROMPT, alone, folder, result, run_all, sent_per_token

RUN = (folder, alone)  # fixtures
GIVEN = ["--policy", "expert-shards", "--top-shards", 2]
GIVEN += ["--set", "cache.policy.newest=24", "--set", "cache.policy.page_tokens=8"]


@pytest.mark.slow
def test_ranks_give_the_tokens_of_one_process_and_any_number_goes_on(folder, tmp_path, alone):
    given = [PROMPT, "--model", folder, "--seed", 3, *GIVEN]
    greedy, sampled = (["--temperature", temperature] for temperature in (0, 1))

    def saved(drawn, name):
        words = [*given, *drawn, "--max-new-tokens", 25, "--split", "shards", "--save-every", 4]
        return [*words, "--save-state", tmp_path / f"state-{name}", "--out", tmp_path / name]

    def resumed(name):
        words = ["--resume", tmp_path / f"state-{name}", "--split", "shards", "--max-new-tokens", 40]
        return [*words, "--out", tmp_path / f"{name}-again"]

    run_all(2, [saved(greedy, "two")])
    run_all(4, [resumed("two"), saved(greedy, "four"), saved(sampled, "drawn")])
    run_all(2, [resumed("four"), resumed("drawn")])
    for name, drawn, count in (("two", greedy, 2), ("four", greedy, 4), ("drawn", sampled, 4)):
        whole = alone(*given, *drawn, "--max-new-tokens", 40)
        assert result(tmp_path / f"{name}-again")["token_ids"] == whole["token_ids"]
        assert alone("--resume", tmp_path / f"state-{name}", "--max-new-tokens", 40)["token_ids"] == whole["token_ids"]
        found = result(tmp_path / name)
        assert found["token_ids"] == whole["token_ids"][:25]
        assert found["communicated_bytes_per_token"] == sent_per_token("tokens", count)
        assert (found["ranks"], found["split"]) == (count, "shards")
        assert len(found["resident_bytes_by_rank"]) == count
        assert sum(found["resident_bytes_by_rank"]) == found["resident_bytes"]
