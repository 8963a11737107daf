"""A step's measures, against plain loops over tokens."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pikv_core.simulation.attention.measure import Measures


def by_loops(row, read, top_tokens, page_tokens):
    """Return recall, bound, hit ratio, tokens and pages of each head, from lists of numbers alone."""
    found = []
    for heads, positions in zip(row.tolist(), read.tolist()):
        kept = {at for at in positions if at >= 0}
        shares = [float(np.mean([head[at] / sum(head) for head in heads])) for at in range(len(heads[0]))]
        falling = sorted(range(len(shares)), key=lambda at: -shares[at])
        top = [at for at in falling[:top_tokens] if shares[at] > 0]
        found.append(
            [
                sum(shares[at] for at in kept),
                sum(shares[at] for at in falling[: len(kept)]),
                len(kept & set(top)) / len(top),
                len(kept),
                len({at // page_tokens for at in kept}),
            ]
        )
    return found


@settings(derandomize=True, deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.integers(1, 20), st.integers(1, 30), st.integers(1, 5), st.booleans())
def test_a_step_is_measured_as_loops_measure_it(seed, num_tokens, top_tokens, page_tokens, tied):
    random = np.random.default_rng(seed)
    row = (random.random((2, 3, num_tokens)) * random.integers(0, 2, (2, 3, num_tokens))).astype(np.float32)
    row = np.ceil(3 * row) if tied else row
    row[:, :, -1] += 1 if tied else 0.01
    read = np.stack([random.permutation(np.arange(-1, num_tokens))[: 1 + num_tokens // 2] for _ in range(2)])
    measures = Measures.empty(1, 1, 2)
    measures.note(0, 0, row, read, read, top_tokens, page_tokens)
    names = ("attention_recall", "oracle_recall", "top_token_hit_ratio", "read_tokens", "pages_read")
    found = np.stack([getattr(measures, name)[0, 0] for name in names], axis=1)
    np.testing.assert_allclose(found, by_loops(row, read, top_tokens, page_tokens), rtol=1e-6, atol=1e-9)
    assert (measures.attention_recall <= measures.oracle_recall + 1e-12).all()


def test_a_row_that_only_sinks_attend_recalls_nothing():
    measures = Measures.empty(1, 1, 1)
    measures.note(0, 0, np.zeros((1, 2, 4), np.float32), np.array([[0, 1]]), np.array([[0]]), 3, 1)
    assert measures.attention_recall[0, 0, 0] == measures.top_token_hit_ratio[0, 0, 0] == 0
    assert measures.resident_tokens[0, 0, 0] == 1
    assert not np.isnan(measures.pages_read).any()


def test_nothing_is_measured_where_nothing_was_noted():
    assert all(np.isnan(x).all() for x in vars(Measures.empty(2, 1, 1)).values())
    with pytest.raises(IndexError):
        Measures.empty(1, 1, 1).note(1, 0, np.ones((1, 1, 2), np.float32), np.array([[0]]), np.array([[0]]), 1, 1)
