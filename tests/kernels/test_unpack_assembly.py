"""The assembly that makes numbers of codes, run instruction by instruction over all pairs of bytes."""

import re

import pytest
import torch

from pikv_kernels import decode_attention, decode_codes

WORDS = torch.arange(2**16)


def run(program, inputs, num_outputs):
    """Run PTX on 32-bit registers, each a vector of int64; return the outputs."""
    registers = {f"${num_outputs + index}": value for index, value in enumerate(inputs)}

    def read(name):
        return registers[name] if name in registers else torch.tensor(int(name, 0))

    for line in re.findall(r"^\s+([a-z][\w.]+ .*?);", program, re.M):
        name, *operands = re.split(r"[\s,]+", line)
        target, *sources = operands
        values = [read(source) for source in sources]
        if name == "mov.b32":
            found = values[0]
        elif name == "shr.b32":
            found = values[0] >> values[1]
        elif name == "and.b32":
            found = values[0] & values[1]
        elif name == "lop3.b32":
            found = lop3(*values)
        elif name == "prmt.b32":
            found = prmt(*values)
        elif name.startswith("fma.rn."):
            found = fma(*values, {"f16x2": torch.float16, "bf16x2": torch.bfloat16}[name.removeprefix("fma.rn.")])
        else:
            raise AssertionError(f"unknown instruction {line}")
        registers[target] = found
    return [registers[f"${index}"] for index in range(num_outputs)]


def lop3(a, b, c, table):
    found = torch.zeros_like(a)
    for minterm in range(8):
        if int(table) >> minterm & 1:
            parts = [x if minterm >> bit & 1 else ~x & 0xFFFFFFFF for x, bit in ((a, 2), (b, 1), (c, 0))]
            found = found | parts[0] & parts[1] & parts[2]
    return found


def prmt(a, b, selector):
    both = a | b << 32
    return sum((both >> 8 * (int(selector) >> 4 * byte & 7) & 0xFF) << 8 * byte for byte in range(4))


def halves(words, dtype):
    """Return the two 16-bit numbers of words as float64."""
    shifted = torch.stack([words & 0xFFFF, words >> 16 & 0xFFFF], dim=-1)
    return shifted.to(torch.uint16).view(dtype).double()


def fma(a, b, c, dtype):
    exact = halves(a, dtype) * halves(b, dtype) + halves(c, dtype)
    low, high = (exact.to(dtype).view(torch.int16).long() & 0xFFFF).unbind(-1)
    return low | high << 16


def centred(words, bits):
    """Return the centred codes of a word's two bytes: low and high nibbles of each, or the bytes."""
    if bits == 4:
        return [(words >> shift & 15) - 8 for shift in (0, 4, 8, 12)]
    return [(words & 255) - 128, (words >> 8 & 255) - 128]


@pytest.mark.parametrize("kind", ["KEYS", "VALUES"])
@pytest.mark.parametrize("bits", [4, 8])
def test_all_codes_become_their_numbers(bits, kind):
    program = getattr(decode_codes, f"{kind}_{bits}_BITS").value
    dtype = torch.float16 if kind == "KEYS" else torch.bfloat16
    first, second = WORDS, WORDS.flip(0)  # two neighbours of a register
    low = first | second << 16
    if bits == 4:
        found = run(program, [low], 4)
        expected = [torch.stack(pair, -1) for pair in zip(centred(first, 4), centred(second, 4))]
    elif kind == "KEYS":
        found = run(program, [low], 2)
        expected = [torch.stack(pair, -1) for pair in zip(centred(first, 8), centred(second, 8))]
    else:
        # The second input holds the upper half's channels: other bytes, in another order.
        others = WORDS.roll(12345), WORDS.roll(777)
        found = run(program, [low, others[0] | others[1] << 16], 4)
        a, b, c, d = (centred(words, 8) for words in (first, second, *others))
        expected = [torch.stack(pair, -1) for pair in ((a[0], b[0]), (c[0], d[0]), (a[1], b[1]), (c[1], d[1]))]
    assert len(found) == len(expected)
    for quarter, (words, codes) in enumerate(zip(found, expected)):
        assert torch.equal(halves(words, dtype), codes.double()), f"quarter {quarter}"


def test_all_8_bit_floats_become_their_numbers():
    codes = torch.tensor([code for code in range(256) if code & 0x7F != 0x7F])
    orders = [codes, codes.roll(1), codes.roll(2), codes.flip(0)]
    packed = sum(order << 8 * byte for byte, order in enumerate(orders))
    low, high = run(decode_attention.FROM_E4M3.value, [packed], 2)
    found = torch.cat([halves(low, torch.float16), halves(high, torch.float16)], -1) * 256
    expected = torch.stack([order.to(torch.uint8).view(torch.float8_e4m3fn).double() for order in orders], -1)
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("over", "dtype", "least"),
    [(decode_codes.OVER_256, torch.float16, 256.0), (decode_codes.OVER_32, torch.bfloat16, 32.0)],
)
def test_codes_of_2_bits_are_set_behind_a_number_of_which_they_are_whole_steps(over, dtype, least):
    fours = 4 * torch.arange(4, dtype=torch.int16)
    numbers = (fours | getattr(over, "value", over)).view(dtype)
    assert torch.equal(numbers.float(), least + torch.arange(4))
    assert torch.equal((numbers - (least + 1.5)).float(), torch.arange(4) - 1.5)
