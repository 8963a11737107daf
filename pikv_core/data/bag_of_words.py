"""A linear classifier of bags of words: how far a text classifier gets without a model.

Softmax regression on tf-idf rows of unit length, L2 weight 1/N.
Shapes: N texts, V words and a bias, C classes.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pikv_core.data.nesterov import minimise

NUM_WORDS = 2000  # that are in most training texts
MOST_TEXTS = 4000  # that are fitted to; the first ones, and this many are predicted at a time
STEPS = 200
# A row with its bias has squared length 2 at most, and softmax curves by at most half of that.
CURVATURE = 1.0

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class BagOfWords:
    columns: dict[str, int]  # of each word
    rarity: Floats  # [V-1], the idf: 1 + ln((1 + N) / (1 + texts with the word))
    weight: Floats  # [V,C], the bias last

    def predict(self, texts: Sequence[str]) -> NDArray[np.int64]:
        """Return the class of each text [N]."""
        parts = [
            (features(texts[start : start + MOST_TEXTS], self.columns, self.rarity) @ self.weight).argmax(axis=1)
            for start in range(0, len(texts), MOST_TEXTS)
        ]
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)


def fit(texts: Sequence[str], labels: NDArray[np.int64], num_classes: int) -> BagOfWords:
    """Fit to texts and their labels [N]."""
    texts, labels = texts[:MOST_TEXTS], labels[:MOST_TEXTS]
    in_texts = Counter(word for text in texts for word in set(words(text)))
    kept = sorted(in_texts, key=lambda word: (-in_texts[word], word))[:NUM_WORDS]
    columns = {word: column for column, word in enumerate(kept)}
    rarity = 1 + np.log((1 + len(texts)) / (1 + np.array([in_texts[word] for word in kept], np.float64)))
    inputs, targets = features(texts, columns, rarity), np.eye(num_classes)[labels]
    decay = 1 / len(texts)
    start = np.zeros((inputs.shape[1], num_classes))
    weight = minimise(lambda at: loss_and_gradient(at, inputs, targets, decay)[1], start, CURVATURE, decay, STEPS)
    return BagOfWords(columns, rarity, weight)


def words(text: str) -> list[str]:
    """Return the words of two letters or more, in lower case."""
    return re.findall(r"[^\W\d_]{2,}", text.lower())


def features(texts: Sequence[str], columns: dict[str, int], rarity: Floats) -> Floats:
    """Return [N,V]: the words' counts by their rarity, each row of length 1 (0 where it knows no word), and a 1."""
    rows = np.zeros((len(texts), len(columns) + 1))
    for row, text in zip(rows, texts, strict=True):
        for word, number in Counter(words(text)).items():
            if word in columns:
                row[columns[word]] = number * rarity[columns[word]]
        row /= max(np.linalg.norm(row), np.finfo(np.float64).tiny)
    rows[:, -1] = 1
    return rows


def loss_and_gradient(weight: Floats, inputs: Floats, targets: Floats, decay: float) -> tuple[float, Floats]:
    """Return the mean cross-entropy plus decay/2 of the squared weight [V,C], and its gradient.

    inputs [N,V], targets [N,C]: rows that sum to 1.
    """
    logits = inputs @ weight
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_probs = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    loss = -(targets * log_probs).sum() / len(inputs) + decay / 2 * (weight**2).sum()
    return float(loss), inputs.T @ (np.exp(log_probs) - targets) / len(inputs) + decay * weight
