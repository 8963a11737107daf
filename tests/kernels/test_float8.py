"""Decoding e4m3 by its bits equals torch's cast, number by number."""

import torch

from pikv_kernels.float8 import decode_e4m3


def test_all_numbers_of_the_format_equal_torchs_cast():
    codes = torch.tensor([code for code in range(256) if code & 0x7F != 0x7F], dtype=torch.uint8)
    found, expected = decode_e4m3(codes), codes.view(torch.float8_e4m3fn).float()
    assert len(codes) == 254 and found.abs().max() == 448
    assert torch.equal(found.view(torch.int32), expected.view(torch.int32))  # the sign of zero too
