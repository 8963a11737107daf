"""Save a generation as it goes, so that one that ends, however it ends, is gone on with token for token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import StoppingCriteria

from pikv_core.cache import PiKVCache, stream
from pikv_core.cache.fingerprint import fingerprint, is_same
from pikv_core.cache.ranks.log import Follower
from pikv_core.cache.snapshot import restore
from pikv_core.errors import PiKVError, UsageError
from pikv_core.recipes import dump
from pikv_core.strict_yaml import parse_yaml

if TYPE_CHECKING:
    from pikv_core.model.loading import LoadedModel
    from pikv_core.schema import GenerateRecipe

OF_ONE_RUN = (
    "prompt",
    "prompt_file",
    "prefix_cache",
    "prefix",
    "save_state",
    "save_every",
    "resume",
    "out",
    "name",
    "threads",
    "device",
    "split",
)


class Saver(StoppingCriteria):
    """Save every few tokens what the next ones depend on; never stops.

    num_prompt_tokens: of the tokens that are passed on, those that were not generated.
    """

    def __init__(self, writer: stream.Writer | Follower, cache: PiKVCache, num_prompt_tokens: int, every: int):
        self._writer, self._cache = writer, cache
        self._num_prompt_tokens, self._every = num_prompt_tokens, every
        self._saved_length = 0

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        if (input_ids.shape[1] - self._num_prompt_tokens) % self._every == 0:
            self.save(input_ids)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def save(self, ids: torch.Tensor) -> None:
        """Save the state after the tokens [B,T], of which the last has not been fed."""
        if ids.shape[1] == self._saved_length:
            return
        random = {"random/cpu": torch.get_rng_state()}
        if ids.is_cuda:
            random["random/cuda"] = torch.cuda.get_rng_state(ids.device)
        self._writer.save(self._cache, ids, {"num_prompt_tokens": self._num_prompt_tokens}, random)
        self._saved_length = ids.shape[1]


def about_run(recipe: GenerateRecipe, loaded: LoadedModel) -> dict[str, Any]:
    """Return what a state says of its run: the recipe without what is of this process alone, and the model."""
    tree = {key: value for key, value in parse_yaml(dump(recipe), "the recipe").items() if key not in OF_ONE_RUN}
    tree["dtype"] = str(loaded.model.dtype).removeprefix("torch.")
    return {"recipe": tree, "fingerprint": fingerprint(loaded.model)}


def go_on(saved: stream.Saved, loaded: LoadedModel, cache: PiKVCache, more: str) -> tuple[torch.Tensor, int]:
    """Put a saved state into an empty cache; return the tokens [1,T] with those of `more`, and how many are the prompt.

    What was generated before `more` belongs to the prompt; without it, it does not. Raises PiKVError for another model.
    """
    if not is_same(fingerprint(loaded.model), saved.about["fingerprint"]):
        raise PiKVError(f"the state is of another model than {loaded.source}", hint="give the model that it came from")
    restore(cache, saved.cache, loaded.model.device)
    torch.set_rng_state(saved.tensors["random/cpu"])
    if loaded.model.device.type == "cuda" and "random/cuda" in saved.tensors:
        torch.cuda.set_rng_state(saved.tensors["random/cuda"], loaded.model.device)
    ids, num_prompt_tokens = saved.tokens.to(loaded.model.device), saved.values["num_prompt_tokens"]
    if not more:
        return ids, num_prompt_tokens
    if cache.looks is not None:
        raise UsageError(
            f"policy '{cache.recipe.policy.name}' has to be shown the whole prompt again, and cannot take more of it",
            hint="go on without a prompt, or choose another policy for the first run",
        )
    added = loaded.tokenizer(more, return_tensors="pt", add_special_tokens=False)["input_ids"].to(ids.device)
    ids = torch.cat([ids, added], dim=1)
    return ids, ids.shape[1]
