"""What the Triton kernels compile to, without a GPU: registers, spills, shared memory, instructions per number.

    python benchmarks/kernels_compiled.py [--arch 90] [--head-dim 128] [--group 4] [--json]

Each operation is called as a user would, on small tensors, and what it would launch is compiled and disassembled
instead. Instructions are those of a thread in the loop (or the whole kernel where there is none) times the threads, per
number that a pass of it reads. A budget is what a card with 4.3 TB/s executes while it reads a number, as far as known.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

os.environ.pop("TRITON_INTERPRET", None)
CACHE = tempfile.TemporaryDirectory()
os.environ["TRITON_CACHE_DIR"] = CACHE.name
sys.path.insert(0, str(Path(__file__).parent.parent / "kernels"))

import torch
import triton
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pikv_kernels import (
    attend_codes,
    attend_pages,
    compact,
    decode_attention,
    decode_codes,
    page_scores,
    quantize_kv,
    split_tokens,
)

BINARIES = Path(triton.backends.nvidia.__file__).parent / "bin"
PER_BYTE = 8.8  # instructions that an H200 executes while it reads a byte
WITH_PROBS = 1.1  # what lengths, a mask and softmax rows may cost beside the attention
QUANTISE = 23.0  # instructions a number that a whole cache of 2^30 numbers is quantised with in 850 µs
POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.uint8: "*u8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
G, S = 8, 2048


class Launch(NamedTuple):
    """What an operation would have launched."""

    kernel: Any
    arguments: dict[str, Any]
    num_warps: int
    num_stages: int


class Recorder:
    """A kernel's stand-in that keeps what it is called with."""

    def __init__(self, kernel: Any, launches: list[Launch]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*arguments: Any, num_warps: int = 4, num_stages: int = 3, **named: Any) -> None:
            names = [parameter.name for parameter in self.kernel.params]
            self.launches.append(Launch(self.kernel, dict(zip(names, arguments)) | named, num_warps, num_stages))

        return launch


def record(call: Callable[[], Any]) -> list[Launch]:
    """Return what a call would launch."""
    launches: list[Launch] = []
    modules = (
        *(attend_codes, attend_pages, compact, decode_attention, decode_codes),
        *(page_scores, quantize_kv, split_tokens),
    )
    kept = [(module, dict(vars(module))) for module in modules]
    for module, names in kept:
        for name, value in names.items():
            if isinstance(value, triton.runtime.jit.JITFunction) and name.startswith("_"):
                setattr(module, name, Recorder(value, launches))
            elif name in ("choose", "choose_for_newest"):
                setattr(module, name, lambda *_, **__: "triton")
    try:
        call()
    finally:
        for module, names in kept:
            vars(module).update(names)
    return launches


def compile_launch(launch: Launch, arch: int) -> Any:
    """Compile as Triton would for these arguments: whole numbers of 1, and multiples of 16, are known to it."""
    signature, constants, hints = {}, {}, {}
    for index, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        is_known = isinstance(value, int) and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (is_known and value == 1):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        signature[parameter.name] = (
            POINTERS[value.dtype] if isinstance(value, torch.Tensor) else "fp32" if isinstance(value, float) else "i32"
        )
        if isinstance(value, torch.Tensor) or (is_known and value % 16 == 0):
            hints[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=hints)
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def disassemble(binary: bytes) -> tuple[int, list[tuple[int, str]]]:
    """Return the registers of a thread, and address and text of every instruction."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        usage, listing = (
            subprocess.run([BINARIES / "cuobjdump", flag, file.name], capture_output=True, text=True, check=True).stdout
            for flag in ("-res-usage", "-sass")
        )
    registers = re.search(r"REG:(\d+)", usage)
    assert registers is not None
    lines = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", listing, re.M)
    return int(registers[1]), [(int(address, 16), text) for address, text in lines]


def longest_loop(instructions: list[tuple[int, str]]) -> list[str]:
    """Return the instructions of the longest loop, all where there is none; a branch to itself ends a kernel."""
    longest: list[str] = []
    for address, text in instructions:
        branch = re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", text)
        if branch and int(branch[1], 16) < address:
            loop = [other for at, other in instructions if int(branch[1], 16) <= at <= address]
            longest = max(longest, loop, key=len)
    return longest or [text for _, text in instructions]


def count_spills(instructions: list[str]) -> int:
    """Return the loads and stores of a thread's own memory."""
    return sum(re.search(r"\b(LDL|STL)\b", text) is not None for text in instructions)


def describe(name: str, launch: Launch, numbers: int, budget: float | None, arch: int) -> dict[str, Any]:
    """Compile and return a row of the table; `numbers` are read by a program in one pass of its loop."""
    compiled = compile_launch(launch, arch)
    registers, instructions = disassemble(compiled.asm["cubin"])
    loop = longest_loop(instructions)
    per_number = len(loop) * launch.num_warps * 32 / numbers
    return {
        "kernel": name,
        "arch": arch,
        "num_warps": launch.num_warps,
        "registers": registers,
        "spills": count_spills([text for _, text in instructions]),
        "loop_spills": count_spills(loop),
        "shared_bytes": compiled.metadata.shared,
        "instructions_per_number": round(per_number, 2),
        "budget": budget,
    }


def rows(arch: int, D: int, R: int) -> Iterator[dict[str, Any]]:
    """Yield a row for each kernel at these head dim and query group."""
    query = torch.zeros(1, G * R, D, dtype=torch.bfloat16)
    full = decode_attention.FullKV(*torch.zeros(2, 1, G, S, D, dtype=torch.bfloat16).unbind(0))
    exact = decode_attention.FullKV(full.keys.float(), full.values.float())
    quantise = functools.partial(quantize_kv.quantize_kv, *full, unit_tokens=64, group_channels=min(64, D // 2))
    codes = {bits: quantise(bits, backend="torch") for bits in (8, 4, 2)}
    byte, scale = torch.zeros(1, G, S, D, dtype=torch.uint8), torch.ones(1, G, S // 64)
    lengths, mask = torch.full((1, G), S), torch.ones(1, 1, S, dtype=torch.bool)
    pages = torch.zeros(1, G, 32, dtype=torch.int64)
    bounds = full.keys[:, :, ::16].contiguous()

    def decode(store: Any, query: torch.Tensor = query, **options: Any) -> Callable[[], Any]:
        return lambda: decode_attention.decode_attention(query, store, 0.1, **options)

    def codes_of(bits: int, **options: Any) -> Callable[[], Any]:
        rows = query.view(1, G, R, D)
        attend = attend_codes.attend_codes
        return lambda: attend(rows, codes[bits], bits, options.pop("visible", None), 0.1, **options)

    float8 = decode_attention.Float8KV(byte, scale, byte, scale)
    everything: dict[str, Any] = {"lengths": lengths, "mask": mask, "with_mass": True}
    decodes = {
        "decode bfloat16": (decode(full), 2.0),
        "decode bfloat16, lengths, mask, probs": (decode(full, **everything), 2.0),
        "decode float32": (decode(exact, query.float()), 4.0),
        "decode fp8": (decode(float8), 1.0),
        "decode pages": (lambda: attend_pages.attend_pages(query, full, pages, 16, 0.1), 2.0),
        "decode int8": (codes_of(8), 1.0),
        "decode int8, mask, probs": (codes_of(8, visible=mask[:, :, None], with_probs=True), 1.0),
        "decode int4": (codes_of(4), 0.5),
        "decode int4, mask, probs": (codes_of(4, visible=mask[:, :, None], with_probs=True), 0.5),
    }
    if R <= decode_codes.MOST_ROWS[2]:
        decodes["decode int2"] = (codes_of(2), 0.5)
    for name, (call, number_bytes) in decodes.items():
        launch = record(call)[0]
        tight = D == 128 and R <= 8
        numbers = 2 * launch.arguments["TILE"] * D
        tight = tight and name != "decode int2"  # its products waste as many as it has, and nothing is made in pairs
        budget = number_bytes * PER_BYTE * (WITH_PROBS if "probs" in name else 1.0)
        yield describe(name, launch, numbers, budget if tight else None, arch)
    merge, normalise = record(decode(full, with_mass=True))[1:]
    yield describe("merge splits", merge, merge.arguments["SPLITS"] * D, None, arch)
    yield describe("normalise rows", normalise, split_tokens.PROBS_TOKENS, None, arch)
    for bits in (8, 4, 2):
        blocks = {"keys": 64 * quantize_kv.KEY_CHANNELS, "values": quantize_kv.VALUE_TOKENS * D}
        for (kind, numbers), launch in zip(blocks.items(), record(lambda bits=bits: quantise(bits))):
            yield describe(f"quantise {kind}, int{bits}", launch, numbers, QUANTISE if D == 128 else None, arch)
    launch = record(lambda: page_scores.page_scores(query.view(1, G, R, D), bounds, bounds, "triton"))[0]
    yield describe("page scores", launch, 2 * page_scores.PAGES_PER_PROGRAM * D, 2 * PER_BYTE, arch)
    launch = record(lambda: compact.compact(full.keys, torch.arange(S).expand(1, G, -1)))[0]
    yield describe("compact", launch, compact.BLOCK_TOKENS * launch.arguments["COLUMNS"], 2 * PER_BYTE, arch)


def main() -> None:
    """Print the table, a row as soon as it is known."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90])
    parser.add_argument("--head-dim", type=int, nargs="+", default=[128])
    parser.add_argument("--group", type=int, nargs="+", default=[4], help="query heads of a key/value head")
    parser.add_argument("--json", action="store_true", help="print rows as JSON, one a line")
    arguments = parser.parse_args()
    if not arguments.json:
        print(f"triton {triton.__version__}; instructions per number of a loop, and the budget")
    for arch in arguments.arch:
        for head_dim in arguments.head_dim:
            for group in arguments.group:
                for row in rows(arch, head_dim, group):
                    row |= {"head_dim": head_dim, "group": group}
                    print(json.dumps(row) if arguments.json else told(row), flush=True)


def told(row: dict[str, Any]) -> str:
    """Return a row as a line."""
    budget = "" if row["budget"] is None else f" of {row['budget']:.1f}"
    return (
        f"sm_{row['arch']} d {row['head_dim']:3} group {row['group']:2}  {row['kernel']:38} {row['num_warps']} warps "
        f"{row['registers']:3} registers {row['spills']} spills {row['shared_bytes'] / 1024:5.1f} KiB "
        f"{row['instructions_per_number']:6.2f}{budget}"
    )


if __name__ == "__main__":
    main()
