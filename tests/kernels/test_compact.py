"""Moving kept tokens in place gives the bits that a gather gives, and writes nothing else."""

import pytest
import torch
from kernel_checks import seeded

from pikv_kernels.compact import compact

B, G = 2, 3


def kept(S, C, device):
    generator = torch.Generator().manual_seed(S)
    chosen = [torch.randperm(S, generator=generator)[:C].sort().values for _ in range(B * G)]
    return torch.stack(chosen).view(B, G, C).to(device)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(("S", "C"), [(1, 1), (63, 0), (65, 64), (200, 77), (300, 300), (1500, 1100), (1500, 130)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_equals_a_gather_to_the_bit(dtype, S, C, backend, device):
    D = 40 if dtype is torch.uint8 else 80
    stored = (seeded(B, G, S, D) * 50).to(dtype).to(device)
    if dtype.is_floating_point:
        stored[:, :, ::7] = torch.nan
    whole = {4: torch.int32, 2: torch.int16, 1: torch.uint8}[stored.element_size()]
    keep = kept(S, C, device)
    bits = stored.view(whole).clone()
    expected = bits.gather(2, keep[..., None].expand(-1, -1, -1, D))
    found = compact(stored, keep, backend)
    assert found._base is stored and torch.equal(found.view(whole), expected)
    assert torch.equal(stored.view(whole)[:, :, C:], bits[:, :, C:]), "tokens beyond the kept ones were written"


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_slice_of_a_larger_buffer_stays_in_it(backend, device):
    buffer = seeded(B, G, 100, 64, device=device)
    before, keep = buffer.clone(), kept(80, 30, device)
    compact(buffer[:, :, 10:90], keep, backend)
    expected = before[:, :, 10:90].gather(2, keep[..., None].expand(-1, -1, -1, 64))
    assert torch.equal(buffer[:, :, 10:40], expected)
    assert torch.equal(buffer[:, :, :10], before[:, :, :10]) and torch.equal(buffer[:, :, 40:], before[:, :, 40:])


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_as_codes_in_every_order_of_kept_runs(backend, device):
    stored = torch.arange(600, device=device).float()[None, None, :, None].expand(1, 4, -1, 64).clone()
    keep = torch.stack(
        [
            torch.arange(300),
            torch.arange(300, 600),
            torch.arange(0, 600, 2),
            torch.arange(600).view(4, 150)[1::2].flatten(),
        ]
    )[None].to(device)
    assert torch.equal(compact(stored, keep, backend)[0, :, :, 5], keep[0].float())
