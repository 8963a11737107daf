"""What one layer's attention costs a new token on a CPU, over every kind of store.

    python benchmarks/kernels_cpu.py [--tokens 16384 65536] [--rounds 5] [--threads 1] [--json FILE]

32/8 heads of 128 over random tokens, against torch's SDPA in float32 with the query group folded into query rows, and
as transformers calls it, `enable_gqa`; the bytes that are read a second over those that a copy of a large buffer reads
and writes. All methods in turn in every round; medians, in processor time on one thread, else in wall time.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from timing import (
    GROUP,
    HEAD_DIM,
    KV_HEADS,
    RANK,
    Clock,
    begin,
    between,
    in_turn,
    options,
    quartiles,
    random_fit,
    random_llama,
    table,
    tell,
)

from pikv_core.cache.page_bounds import PageBounds
from pikv_core.cache.rotary import Rotary
from pikv_core.compression.base import Codec
from pikv_core.compression.fp8 import Float8
from pikv_core.compression.int2 import Int2
from pikv_core.compression.int4 import Int4
from pikv_core.compression.int8 import Int8
from pikv_core.compression.levels import Levels
from pikv_core.compression.none import Plain
from pikv_kernels.attend_tokens import attend_tokens
from pikv_kernels.backends import backend_report
from pikv_kernels.page_scores import page_scores

PAGE_TOKENS, PAGES = 16, 64
COPIED_NUMBERS = 2**26  # of float32: beyond all caches
LOW_RANK = {f"low rank of {RANK}": False, f"low rank of {RANK}, rotated when read": True}


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[16384, 65536])
    arguments = parser.parse_args()
    clock, found = begin(arguments)
    with torch.inference_mode():
        found["attention"] = [
            row for count in arguments.tokens for row in attention_rows(count, arguments.rounds, clock)
        ]
    found["backends"] = [choice._asdict() for choice in backend_report()]
    tell(found, tables(found), arguments.json)


def attention_rows(num_tokens: int, rounds: int, clock: Clock) -> list[dict[str, Any]]:
    """Measure one layer's attention by each kernel."""
    query, (keys, values) = (
        torch.randn(1, KV_HEADS, GROUP, HEAD_DIM),
        torch.randn(2, 1, KV_HEADS, num_tokens, HEAD_DIM).unbind(0),
    )
    position = torch.arange(num_tokens).expand(1, KV_HEADS, -1)
    scale = HEAD_DIM**-0.5
    low, half = (keys.bfloat16(), values.bfloat16()), (keys.half(), values.half())
    bounds = PageBounds(PAGE_TOKENS)
    bounds.append(keys, None)
    plain = Plain()
    runs: dict[str, Callable[[], Any]] = {
        "SDPA, folded": lambda: F.scaled_dot_product_attention(query, keys, values, scale=scale),
        "SDPA, enable_gqa": lambda: F.scaled_dot_product_attention(
            query.view(1, KV_HEADS * GROUP, 1, HEAD_DIM), keys, values, scale=scale, enable_gqa=True
        ),
        "float32": lambda: attend_tokens(query, keys, values, None, scale, backend="numba"),
        "bfloat16": lambda: attend_tokens(query, *low, None, scale, backend="numba"),
        "float16": lambda: attend_tokens(query, *half, None, scale, backend="numba"),
    }
    exact = keys.nbytes + values.nbytes
    read = dict.fromkeys(runs, exact) | {"bfloat16": exact // 2, "float16": exact // 2}
    rotary = Rotary.of(random_llama(1, num_tokens))
    codecs: dict[str, Codec] = {codec.name: codec for codec in (Int8(), Int4(), Int2(), Float8(), Levels())}
    codecs |= {name: random_fit(unrotated).codec(0, rotary) for name, unrotated in LOW_RANK.items()}
    for name, codec in codecs.items():
        whole = num_tokens // codec.unit_tokens * codec.unit_tokens
        codes = codec.encode(keys[:, :, :whole], values[:, :, :whole], position[..., :whole])
        runs[name] = lambda codec=codec, codes=codes, at=position[..., :whole]: codec.attend(
            query, codes, at, None, scale, None, False
        )
        read[name] = sum(x.nbytes for x in codes.values())
    stored = {"keys": keys, "values": values}

    def quest() -> Any:
        pages = page_scores(query, bounds.lowest, bounds.highest, "numba").topk(min(PAGES, bounds.num_pages)).indices
        return plain.attend_pages(query, stored, pages, PAGE_TOKENS, None, scale, None)

    picked = f"quest, {PAGES} pages of {PAGE_TOKENS}"
    runs[picked] = quest
    read[picked] = bounds.lowest.nbytes + bounds.highest.nbytes + exact * PAGES * PAGE_TOKENS // num_tokens
    source = torch.ones(COPIED_NUMBERS)
    target = torch.empty_like(source)
    times = in_turn({**runs, "copy": lambda: target.copy_(source)}, rounds, 3, clock)
    medians = {name: statistics.median(seen) for name, seen in times.items()}
    copied = 2 * source.nbytes / medians["copy"]
    return [
        {
            "num_tokens": num_tokens,
            "method": name,
            **quartiles(times[name]),
            "times_faster": medians["SDPA, folded"] / medians[name],
            "times_unfolded": medians["SDPA, enable_gqa"] / medians[name],
            "bytes_read": read[name],
            "share_of_copy": read[name] / medians[name] / copied,
        }
        for name in runs
    ]


def tables(found: dict[str, Any]) -> dict[str, str]:
    """Return the Markdown tables by name."""
    rows = [
        f"| {row['num_tokens']:,} | {row['method']} | {row['ms']:.2f} | {between(row)} | {row['times_faster']:.1f} | "
        f"{row['times_unfolded']:.1f} | {row['share_of_copy']:.0%} |"
        for row in found["attention"]
    ]
    head = "| tokens | over | ms | quartiles | × folded SDPA | × SDPA with enable_gqa | of a copy's bytes/s |"
    return {"attention": table(head, rows)}


if __name__ == "__main__":
    main()
