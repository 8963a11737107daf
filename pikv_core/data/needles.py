"""Key-value needles scattered through filler, then questions: the sampler of the recall task.

Multi-query associative recall (arXiv 2312.04927) over any filler. Shapes: B samples, T tokens, C tokens of
context, P needles, Q questions, N tokens of one needle, F tokens of filler.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pikv_core.data.source import Batch


@dataclass(frozen=True)
class RecallBatch(Batch):
    """Questions follow the context back to back: each is `question_tokens` tokens, then one answer token."""

    context_length: int  # tokens before the questions
    question_tokens: int  # tokens of one question before its answer (1: the key; 2: marker and key)
    depth: np.ndarray  # float [B, Q] in [0, 1]: where the asked needle lies in the context


@dataclass(frozen=True)
class Layout:
    """Token ids that needles and questions are made of; a marker is empty or one token."""

    keys: np.ndarray
    values: np.ndarray
    needle_marker: tuple[int, ...] = ()
    question_marker: tuple[int, ...] = ()

    @property
    def needle_tokens(self) -> int:
        return len(self.needle_marker) + 2


def sample(
    rng: np.random.Generator,
    layout: Layout,
    fill: Callable[[int], np.ndarray],
    natural: bool,
    num_samples: int,
    length: int,
    num_pairs: int,
    num_questions: int,
) -> RecallBatch:
    """Draw samples of `length` tokens; each key is used by one needle, needles never overlap.

    fill: given F, returns filler ids [B, F]. natural: whether the filler is text to be learned too.
    """
    assert num_questions <= num_pairs <= len(layout.keys)
    N, P, Q = layout.needle_tokens, num_pairs, num_questions
    C = length - N * Q
    assert N * P <= C
    keys_BP = layout.keys[rng.random((num_samples, len(layout.keys))).argsort(1)[:, :P]]
    values_BP = layout.values[rng.integers(len(layout.values), size=(num_samples, P))]
    starts_BP = np.sort(rng.random((num_samples, C - (N - 1) * P)).argsort(1)[:, :P], axis=1)
    starts_BP = starts_BP + (N - 1) * np.arange(P)
    asked_BQ = rng.random((num_samples, P)).argsort(1)[:, :Q]

    ids_BT = np.empty((num_samples, length), np.int64)
    rows_B11 = np.arange(num_samples)[:, None, None]
    places_BPN = starts_BP[:, :, None] + np.arange(N)
    is_filler_BC = np.ones((num_samples, C), bool)
    is_filler_BC[rows_B11, places_BPN] = False
    ids_BT[:, :C][is_filler_BC] = fill(C - N * P).reshape(-1)
    ids_BT[rows_B11, places_BPN] = _phrases(layout.needle_marker, keys_BP, values_BP)
    asked_keys_BQ = np.take_along_axis(keys_BP, asked_BQ, axis=1)
    asked_values_BQ = np.take_along_axis(values_BP, asked_BQ, axis=1)
    questions_BQN = _phrases(layout.question_marker, asked_keys_BQ, asked_values_BQ)
    ids_BT[:, C:] = questions_BQN.reshape(num_samples, -1)

    answer_mask_BT = np.zeros((num_samples, length), bool)
    answer_mask_BT[:, C + N - 2 :: N] = True
    text_mask_BT = np.zeros((num_samples, length), bool)
    if natural:
        text_mask_BT[:, : C - 1] = is_filler_BC[:, :-1] & is_filler_BC[:, 1:]
    depth_BQ = np.take_along_axis(starts_BP, asked_BQ, axis=1) / max(1, C - N)
    return RecallBatch(ids_BT, answer_mask_BT, text_mask_BT, C, N - 1, depth_BQ)


def _phrases(marker: tuple[int, ...], keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return [..., N]: the marker, the key, its value."""
    markers = np.broadcast_to(np.asarray(marker, np.int64), (*keys.shape, len(marker)))
    return np.concatenate([markers, keys[..., None], values[..., None]], axis=-1)
