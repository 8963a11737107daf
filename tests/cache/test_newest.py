"""A decoded token through numba's kernels is the one through torch, whatever keeps the tokens and in whatever form."""

import pytest
import torch
from single_layer import single_layer

from pikv_core.compression.fp8 import Float8
from pikv_core.compression.int2 import Int2
from pikv_core.compression.int4 import Int4
from pikv_core.compression.int8 import Int8
from pikv_core.compression.none import Plain
from pikv_core.scheduling.full import Full
from pikv_core.scheduling.h2o import H2O
from pikv_core.scheduling.quest import Quest
from pikv_core.scheduling.snapkv import SnapKV
from pikv_kernels.backends import backend_report, forced

B, H, G, D = 2, 8, 2, 32
CODECS = {
    "none": Plain,
    "int8": lambda: Int8(group=16),
    "int4": lambda: Int4(group=16),
    "int2 in halves of pages": lambda: Int2(group=8),
    "fp8": lambda: Float8(page=16),
}
POLICIES = {
    "full": (Full(), 1.0),
    "h2o": (H2O(), 0.5),
    "snapkv": (SnapKV(window=16), 0.5),
    "quest": (Quest(dense_layers=0), 64),
}


def decoded(policy, codec, backend, window, padded, sinks):
    """Return the outputs of 20 tokens after a prompt, the stored positions, and the layer's bytes."""
    generator = torch.Generator().manual_seed(0)
    layer = single_layer(*POLICIES[policy], CODECS[codec](), window=window)
    outputs = []
    with forced(backend):
        for T in (150, *[1] * 20):
            layer.update(*torch.randn(2, B, G, T, D, generator=generator).unbind(0))
            is_token = torch.arange(T).expand(B, T) >= torch.tensor([[40], [0]]) if padded and T > 1 else None
            query = torch.randn(B, H, T, D, generator=generator)
            outputs.append(
                layer.attend(query, D**-0.5, is_token, 20.0 if sinks else None, torch.ones(H) if sinks else None)
            )
    return torch.cat(outputs[1:], dim=2), layer.positions(), layer.resident_bytes


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("case", ["plain", "padded", "sinks"])
def test_kernels_give_the_tokens_of_the_plain_path(policy, codec, case):
    found = decoded(policy, codec, "numba", None, case == "padded", case == "sinks")
    expected = decoded(policy, codec, "torch", None, case == "padded", case == "sinks")
    assert (found[0] - expected[0]).abs().max() < 1e-5
    assert torch.equal(found[1], expected[1])
    assert found[2] == expected[2]
    assert any(choice.backend == "numba" and choice.reason == "forced" for choice in backend_report())


@pytest.mark.parametrize("codec", CODECS)
def test_kernels_keep_to_a_sliding_window(codec):
    found, expected = (decoded("full", codec, backend, 50, True, False) for backend in ("numba", "torch"))
    assert (found[0] - expected[0]).abs().max() < 1e-5
