"""What the papers say, in plain loops over Python floats: one row and one key/value head at a time.

attention[r][q][s]: of the r-th query head of the group, query q over token s. All tokens are real ones, in order.
"""

import math


def group_mean(attention, q, s):
    return math.fsum(head[q][s] for head in attention) / len(attention)


def h2o(attention, budget, heavy_share):
    """Return each token's accumulated attention, inf for the newest ones."""
    num_tokens = len(attention[0])
    num_recent = budget - int(budget * heavy_share)
    score = []
    for s in range(num_tokens):
        mass = math.fsum(group_mean(attention, q, s) for q in range(num_tokens))
        score.append(math.inf if s >= num_tokens - num_recent else mass)
    return score


def tova(layer_attention):
    """Return the newest query's attention, the mean over all heads of all groups; inf for the newest token."""
    num_tokens = len(layer_attention[0][0])
    rows = [head[-1] for attention in layer_attention for head in attention]
    return [math.fsum(row[s] for row in rows) / len(rows) for s in range(num_tokens - 1)] + [math.inf]


def lru(attention, steps, tau):
    """Return (last use, position) of each token."""
    use = list(range(len(attention[0])))
    end = 0
    for step in steps:
        end += step
        if step == 1:
            q = end - 1
            for s in range(end):
                if group_mean(attention, q, s) > tau / end:
                    use[s] = q
    return [(last, position) for position, last in enumerate(use)]


def lfu(attention, tau):
    """Return (number of uses, position) of each token."""
    num_tokens = len(attention[0])
    return [
        (sum(group_mean(attention, q, s) > tau / (q + 1) for q in range(s, num_tokens)), s) for s in range(num_tokens)
    ]


def snapkv(attention, num_queries, budget, window, kernel, pooling):
    """Return the pooled votes of the last queries, inf for the newest tokens; votes of the window itself are none."""
    num_tokens = len(attention[0])
    before = max(0, num_tokens - window)
    voters = range(num_tokens - min(window, num_queries), num_tokens)
    votes = [math.fsum(group_mean(attention, q, s) for q in voters) for s in range(before)]
    pooled = []
    for s in range(num_tokens):
        near = [votes[i] if 0 <= i < before else 0.0 for i in range(s - kernel // 2, s - kernel // 2 + kernel)]
        pooled.append(max(near) if pooling == "max" else math.fsum(near) / kernel)
    num_kept = min(window, budget)
    return [math.inf if s >= num_tokens - num_kept else pooled[s] for s in range(num_tokens)]


def knorm(keys):
    return [-math.sqrt(math.fsum(x * x for x in key)) for key in keys]


def keydiff(keys):
    unit = [[x / -length for x in key] for key, length in zip(keys, knorm(keys))]
    anchor = [math.fsum(column) / len(keys) for column in zip(*unit)]
    length = math.sqrt(math.fsum(x * x for x in anchor))
    return [-math.fsum(a * b for a, b in zip(key, anchor)) / length for key in unit]


def ada_kv_counts(scores, mean):
    """Return how many of the layer's highest scores each head has; scores[g][s], -inf for empty slots."""
    best = sorted(
        ((score, -rank, -head) for head, row in enumerate(scores) for rank, score in enumerate(sorted(row)[::-1])),
        reverse=True,
    )
    counts = [0] * len(scores)
    for score, _, head in best[: mean * len(scores)]:
        if score > -math.inf:
            counts[-head] += 1
    return counts


def pyramidkv(mean, num_seen, num_layers, window, beta):
    """Return the real-valued budgets of the layers as the authors' description has them."""
    b = mean - window
    if b <= 0 or num_seen < 2 * b:
        return [float(mean)] * num_layers
    low, high = b / beta, 2 * b - b / beta
    if high >= num_seen - window:
        high = num_seen - window
        low = 2 * b - high
    return [window + high - layer * (high - low) / (num_layers - 1) for layer in range(num_layers)]


def kvpress_pyramid(mean, num_seen, num_layers, window, beta):
    """Return whole budgets of the layers by the rule of the kvpress library (0.5.5)."""
    low, high = mean / beta, 2 * mean - mean / beta
    if high >= num_seen - window:
        high = num_seen - window
        low = 2 * mean - high
    if not num_seen >= high >= low >= window:
        return [mean] * num_layers
    return [round(high - layer * ((high - low) / (num_layers - 1))) for layer in range(num_layers)]


def entropy(layer_attention, num_queries):
    """Return the mean entropy in nats of the last queries' rows over all heads of all groups."""
    rows = [row for attention in layer_attention for head in attention for row in head[-num_queries:]]
    return math.fsum(-p * math.log(p) for row in rows for p in row if p > 0) / len(rows)
