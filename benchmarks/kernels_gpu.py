"""The Triton kernels on a GPU: right at real sizes, then how fast beside a copy and torch's own attention.

    python benchmarks/kernels_gpu.py [--json FILE] [--seconds 420] [--tiny]

Needs torch and triton alone. Shapes are those of a layer of Llama 3.1 8B: 16 sequences of 32k tokens, 32 query heads
over 8 key/value heads of 128 channels. Times are medians of CUDA events around a replayed graph, with the L2 cache
flushed before. What a step printed stays: a step that fails is told and the next one runs, in a new process where the
GPU no longer answers. Last, other ways to cut the kernels are tried until the seconds are over. `--tiny` runs the same
code on small tensors, without a GPU under Triton's interpreter.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "kernels")]
os.environ["TRITON_INTERPRET"] = "1" if "--tiny" in sys.argv and not torch.cuda.is_available() else "0"

import triton
from sanitizer import sanitize

from pikv_kernels import compact as compact_kernel
from pikv_kernels import decode_attention as full_kernel
from pikv_kernels import decode_codes as codes_kernel
from pikv_kernels import quantize_kv as quantise_kernel
from pikv_kernels.attend_codes import attend_codes, define_attend_codes
from pikv_kernels.attend_pages import attend_pages, define_attend_pages
from pikv_kernels.attend_tokens import attend_tokens
from pikv_kernels.backends import backend_report
from pikv_kernels.compact import compact
from pikv_kernels.decode_attention import Float8KV, FullKV, Store, decode_attention, define_decode_attention
from pikv_kernels.page_scores import page_scores, page_topk
from pikv_kernels.quantize_kv import quantize_kv
from pikv_kernels.split_tokens import Launch

BITS = (8, 4, 2)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PAGE = 16
UNIT = 64
FLUSHED_BYTES = 256 * 2**20
HIGHEST_E4M3 = 448.0
OTHER_SHAPES = (
    (64, 8, ("float32", "float16", "int8", "int4")),
    (80, 1, ("bfloat16", "int4")),
    (256, 16, ("bfloat16", "fp8", "int8")),
)
TARGETS_US = {
    "decode bfloat16": 590,
    "decode int8": 350,
    "decode int4": 300,
    "quest": 110,
    "quantise int4": 850,
    "compact half": 715,
}


class Inputs:
    """Tensors of one layer, each made when it is first asked for."""

    def __init__(self, B: int, G: int, R: int, S: int, D: int, num_pages: int) -> None:
        self.B, self.G, self.R, self.S, self.D, self.num_pages = B, G, R, S, D, num_pages
        self.scale = D**-0.5
        self.generator = torch.Generator(DEVICE).manual_seed(time.time_ns() % 2**31)

    def normal(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator, device=DEVICE, dtype=dtype)

    @cached_property
    def query(self) -> torch.Tensor:
        return 3 * self.normal(self.B, self.G * self.R, self.D)  # so that some tokens weigh more than others

    @cached_property
    def full(self) -> FullKV:
        return FullKV(*(self.normal(self.B, self.G, self.S, self.D) for _ in range(2)))

    @cached_property
    def int8(self) -> dict[str, torch.Tensor]:
        return self.quantised(8, "torch")

    @cached_property
    def int4(self) -> dict[str, torch.Tensor]:
        return self.quantised(4, "torch")

    @cached_property
    def int2(self) -> dict[str, torch.Tensor]:
        return self.quantised(2, "torch")

    def quantised(self, bits: int, backend: str) -> dict[str, torch.Tensor]:
        channels = next(width for width in range(min(UNIT, self.D), 0, -1) if self.D % width == 0)
        return quantize_kv(*self.full, bits, UNIT, channels, backend=backend)

    @property
    def rows(self) -> torch.Tensor:
        return self.query.view(self.B, self.G, self.R, self.D)

    @cached_property
    def float8(self) -> Float8KV:
        parts = []
        for numbers in self.full:
            units = numbers.float().unflatten(2, (-1, 64))
            scale = units.abs().amax((-1, -2)) / HIGHEST_E4M3
            codes = (units / scale[..., None, None]).to(torch.float8_e4m3fn)
            parts += [codes.view(torch.uint8).flatten(2, 3), scale]
        return Float8KV(*parts)

    @cached_property
    def bounds(self) -> tuple[torch.Tensor, torch.Tensor]:
        pages = self.full.keys.unflatten(2, (-1, PAGE))
        return pages.amin(3), pages.amax(3)

    @cached_property
    def pages(self) -> torch.Tensor:
        return page_topk(self.scores(), self.num_pages)

    @cached_property
    def units(self) -> torch.Tensor:
        num_read = min(self.S // UNIT, max(1, self.num_pages * PAGE // UNIT))
        return (
            torch.rand(self.B, self.G, self.S // UNIT, generator=self.generator, device=DEVICE).topk(num_read).indices
        )

    @cached_property
    def keep_half(self) -> torch.Tensor:
        chosen = torch.rand(self.B, self.G, self.S, generator=self.generator, device=DEVICE).topk(self.S // 2).indices
        return chosen.sort(-1).values

    @cached_property
    def lengths(self) -> torch.Tensor:
        return torch.randint(0, self.S + 1, (self.B, self.G), generator=self.generator, device=DEVICE)

    @cached_property
    def mask(self) -> torch.Tensor:
        return torch.rand(self.B, 1, self.S, generator=self.generator, device=DEVICE) < 0.7

    def scores(self, backend: str | None = "triton") -> torch.Tensor:
        return page_scores(self.rows, *self.bounds, backend)


def bytes_of(*tensors: torch.Tensor | None) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


def differ(found: torch.Tensor, expected: torch.Tensor) -> tuple[float, float]:
    """Return ‖found - expected‖ / ‖expected‖ and the largest difference, of what is finite; infinities must agree."""
    found, expected = found.double(), expected.double()
    finite = expected.isfinite()
    if not torch.equal(found.isfinite(), finite) or not torch.equal(found[~finite], expected[~finite]):
        return float("nan"), float("nan")
    apart = (found - expected)[finite]
    norm = expected[finite].norm().clamp(min=1e-30)
    return (apart.norm() / norm).item(), apart.abs().max().item() if apart.numel() else 0.0


def check_store(
    inputs: Inputs, store: Store, query: torch.Tensor, tolerance: float, plainly: bool = True
) -> Iterator[dict[str, Any]]:
    """Compare decoding with its definition: plainly, and with lengths, a mask and the mass."""
    everything = {"lengths": inputs.lengths, "mask": inputs.mask, "with_mass": True}
    for options in ({}, everything) if plainly else (everything,):
        expected = define_decode_attention(query, store, inputs.scale, **options)  # type: ignore[arg-type]
        found = decode_attention(query, store, inputs.scale, **options, backend="triton")  # type: ignore[arg-type]
        for part, allowed in (("output", tolerance), ("lse", 1e-3), ("mass", tolerance)):
            ours, theirs = getattr(found, part), getattr(expected, part)
            if theirs is not None:
                relative, most = differ(ours, theirs)
                what = part if not options else f"{part}, lengths and mask"
                yield {"what": what, "relative": relative, "max": most, "right": relative <= allowed}


def check_codes(
    inputs: Inputs, codes: dict[str, torch.Tensor], bits: int, query: torch.Tensor, plainly: bool = True
) -> Iterator[dict[str, Any]]:
    """Compare attention over codes with its definition: plainly, over some units, and with a mask, a cap and rows."""
    rows = query.view_as(inputs.rows)
    everything = {"visible": inputs.mask[:, :, None], "softcap": 5.0, "with_probs": True}
    some = {"visible": inputs.mask[:, :, None], "units": inputs.units}
    told = (("", {}), (", some units", some)) if plainly else ()
    for what, options in (*told, (", mask and cap", everything)):
        arguments = {"visible": None, "scale": inputs.scale} | options
        expected = define_attend_codes(rows.float(), codes, bits, **arguments)  # type: ignore[arg-type]
        found = attend_codes(rows, codes, bits, **arguments, backend="triton")  # type: ignore[arg-type]
        for part, allowed in (("output", 1e-2), ("lse", 1e-3), ("probs", 1e-2)):
            ours, theirs = getattr(found, part), getattr(expected, part)
            if theirs is not None:
                relative, most = differ(ours, theirs)
                yield {"what": f"{part}{what}", "relative": relative, "max": most, "right": relative <= allowed}


def check_rows(inputs: Inputs) -> Iterator[dict[str, Any]]:
    """Compare what the cache asks for in full precision: a mask, a cap, and every query head's softmax row."""
    arguments = (inputs.rows, *inputs.full, inputs.mask[:, :, None], inputs.scale, 5.0, True)
    found, expected = (attend_tokens(*arguments, backend=backend) for backend in ("triton", "torch"))
    for part, ours, theirs in zip(("output", "lse", "probs"), found, expected):
        relative, most = differ(ours, theirs)
        yield {"what": f"{part}, mask and cap", "relative": relative, "max": most, "right": relative <= 1e-2}


def check_pages(inputs: Inputs) -> Iterator[dict[str, Any]]:
    relative, most = differ(inputs.scores(), inputs.scores("torch"))
    yield {"what": "scores", "relative": relative, "max": most, "right": relative <= 1e-2}
    for lengths in (None, inputs.lengths):
        expected = define_attend_pages(inputs.query, inputs.full, inputs.pages, PAGE, inputs.scale, lengths)
        found = attend_pages(inputs.query, inputs.full, inputs.pages, PAGE, inputs.scale, lengths, "triton")
        relative, most = differ(found.output, expected.output)
        what = "output" if lengths is None else "output, lengths"
        yield {"what": what, "relative": relative, "max": most, "right": relative <= 1e-2}


def check_quantize(inputs: Inputs, bits: int) -> Iterator[dict[str, Any]]:
    expected = getattr(inputs, f"int{bits}")
    for name, ours in inputs.quantised(bits, "triton").items():
        share = (ours != expected[name]).double().mean().item()
        allowed = 2e-3 if name.endswith("codes") else 0.0
        yield {"what": f"{name}, share that differs", "relative": share, "max": 0.0, "right": share <= allowed}


def check_compact(inputs: Inputs) -> Iterator[dict[str, Any]]:
    stored = inputs.full.keys.clone()
    stored[:, :, 5] = torch.nan
    whole = stored.view(torch.int16)
    expected = whole.gather(2, inputs.keep_half[..., None].expand(-1, -1, -1, inputs.D))
    found = compact(stored, inputs.keep_half, "triton").view(torch.int16)
    wrong = (found != expected).double().mean().item()
    yield {"what": "share of wrong numbers", "relative": wrong, "max": 0.0, "right": wrong == 0.0}


def check_shape(D: int, R: int, tokens: int, stores: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """Check some stores at another head dim and group."""
    inputs = Inputs(2, 2, R, tokens, D, 3)
    known: dict[str, tuple[Callable[[], Store], torch.dtype]] = {
        "float32": (lambda: FullKV(*(x.float() for x in inputs.full)), torch.float32),
        "float16": (lambda: FullKV(*(x.half() for x in inputs.full)), torch.float16),
        "bfloat16": (lambda: inputs.full, torch.bfloat16),
        "fp8": (lambda: inputs.float8, torch.bfloat16),
    }
    for name in stores:
        if name.startswith("int"):
            codes, dtype = getattr(inputs, name), torch.float16 if name == "int8" else torch.float32
            for row in check_codes(inputs, codes, int(name[3:]), inputs.query.to(dtype), plainly=False):
                yield row | {"what": f"{name} {row['what']}"}
            continue
        make, dtype = known[name]
        tolerance = 1e-3 if name == "float32" else 1e-2
        for row in check_store(inputs, make(), inputs.query.to(dtype), tolerance, plainly=False):
            yield row | {"what": f"{name} {row['what']}"}


def measure(call: Callable[[], Any], repeats: int = 25) -> tuple[float, str]:
    """Return the median time in microseconds, and how it was launched: "graph" or "eager"."""
    if DEVICE == "cpu":
        start = time.perf_counter()
        call()
        return 1e6 * (time.perf_counter() - start), "eager"
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    run, how = call, "eager"
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        run, how = graph.replay, "graph"
    except RuntimeError as error:
        print(f"    no graph: {str(error).splitlines()[0]}", flush=True)
        torch.cuda.synchronize()
    run()
    flushed = torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device=DEVICE)
    times = []
    for _ in range(repeats):
        flushed.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        times.append((begin, end))
    torch.cuda.synchronize()
    return statistics.median(1e3 * begin.elapsed_time(end) for begin, end in times), how


def timed_ops(inputs: Inputs) -> Iterator[tuple[str, Callable[[], Callable[[], Any]], Callable[[], int]]]:
    """Yield an operation's name, what makes the call to be timed, and the bytes that it must move."""
    B, G, R, S, D = inputs.B, inputs.G, inputs.R, inputs.S, inputs.D
    selected = 2 * B * G * inputs.num_pages * PAGE * D * 2

    def folded() -> Callable[[], Any]:
        rows = inputs.rows
        return lambda: F.scaled_dot_product_attention(rows, *inputs.full, scale=inputs.scale)

    def unfolded() -> Callable[[], Any]:
        rows = inputs.query.view(B, G * R, 1, D)
        return lambda: F.scaled_dot_product_attention(rows, *inputs.full, scale=inputs.scale, enable_gqa=True)

    def decode(store: str, with_probs: bool = False) -> Callable[[], Callable[[], Any]]:
        return lambda: decoding(inputs, store, with_probs)

    def pages() -> Callable[[], Any]:
        listed = inputs.pages
        return lambda: attend_pages(inputs.query, inputs.full, listed, PAGE, inputs.scale, backend="triton")

    def quest() -> Callable[[], Any]:
        return lambda: attend_pages(
            inputs.query,
            inputs.full,
            page_topk(inputs.scores(), inputs.num_pages),
            PAGE,
            inputs.scale,
            backend="triton",
        )

    def topk() -> Callable[[], Any]:
        scores = inputs.scores()
        return lambda: page_topk(scores, inputs.num_pages)

    def move() -> Callable[[], Any]:
        stores = [x.clone() for x in inputs.full]
        return lambda: [compact(x, inputs.keep_half, "triton") for x in stores]

    yield "SDPA enable_gqa", unfolded, lambda: bytes_of(*inputs.full)
    yield "SDPA folded", folded, lambda: bytes_of(*inputs.full)
    for store, name in (("full", "bfloat16"), ("float8", "fp8"), *((f"int{bits}", f"int{bits}") for bits in BITS)):
        yield f"decode {name}", decode(store), lambda store=store: bytes_of(*parts_of(inputs, store))
        if name != "fp8":
            yield (
                f"decode {name} with rows",
                decode(store, True),
                lambda store=store: bytes_of(*parts_of(inputs, store)) + 4 * B * G * R * S,
            )
    yield "page scores", lambda: inputs.scores, lambda: bytes_of(*inputs.bounds)
    yield "page top-k", topk, lambda: 4 * B * G * S // PAGE
    yield "attend pages", pages, lambda: selected
    yield "quest", quest, lambda: bytes_of(*inputs.bounds) + selected
    for bits in BITS:
        yield (
            f"quantise int{bits}",
            lambda bits=bits: lambda: inputs.quantised(bits, "triton"),
            lambda bits=bits: bytes_of(*inputs.full, *parts_of(inputs, f"int{bits}")),
        )
    codes_read = inputs.units.shape[2] * UNIT * D * 2 * B * G
    for bits in BITS:
        yield (
            f"attend units int{bits}",
            lambda bits=bits: decoding(inputs, f"int{bits}", False, inputs.units),
            lambda bits=bits: codes_read * bits // 8,
        )
    yield "compact half", move, lambda: bytes_of(*inputs.full) + 2 * bytes_of(inputs.keep_half)


def parts_of(inputs: Inputs, store: str) -> list[torch.Tensor]:
    """Return what a store is made of."""
    stored = getattr(inputs, store)
    return list(stored.values() if isinstance(stored, dict) else stored)


def decoding(
    inputs: Inputs, store: str, with_probs: bool = False, units: torch.Tensor | None = None
) -> Callable[[], Any]:
    """Return the call that attends over a store as the cache does, fp8 apart."""
    stored, rows, scale = getattr(inputs, store), inputs.rows, inputs.scale
    if store == "float8":
        return lambda: decode_attention(inputs.query, stored, scale, backend="triton")
    if store == "full":
        return lambda: attend_tokens(rows, *stored, None, scale, None, with_probs, backend="triton")
    bits = int(store[3:])
    return lambda: attend_codes(rows, stored, bits, None, scale, None, with_probs, units, backend="triton")


class Cut(NamedTuple):
    """Another way to cut a kernel: what is timed, and the constants of a module meanwhile."""

    op: str
    call: Callable[[], Any]
    module: Any
    constants: dict[str, Any]

    @property
    def label(self) -> str:
        told = (value[1:] if isinstance(value, Launch) else value for value in self.constants.values())
        return ", ".join(str(value) for value in told)


def cuts(inputs: Inputs) -> Iterator[Cut]:
    """Yield other cuts: (warps, tiles ahead, programs a multiprocessor), channels and tokens, or bytes and tokens."""

    def decode(store: str) -> Callable[[], Any]:
        return lambda: decoding(inputs, store)()

    def pages() -> Any:
        return attend_pages(inputs.query, inputs.full, inputs.pages, PAGE, inputs.scale, backend="triton")

    grid = {
        "decode int4": (codes_kernel, "FEW_HEADS_4_BITS", decode("int4"), ((1, 2, 8), (1, 4, 6), (2, 3, 6), (2, 4, 4))),
        "decode int8": (codes_kernel, "FEW_HEADS_8_BITS", decode("int8"), ((2, 4, 4), (2, 2, 6), (1, 3, 6), (4, 3, 3))),
        "decode fp8": (full_kernel, "FLOAT8", decode("float8"), ((2, 4, 4), (1, 3, 8), (4, 3, 3))),
        "decode bfloat16": (full_kernel, "WHOLE", decode("full"), ((4, 3, 2), (4, 2, 4), (2, 3, 3))),
        "attend pages": (full_kernel, "PAGES", pages, ((2, 2, 4), (4, 3, 3), (4, 4, 2), (2, 3, 1))),
    }
    for name, (module, constant, call, tried) in grid.items():
        standing = getattr(module, constant)
        for factor in (2, 4):
            launch = standing._replace(programs_per_sm=factor * standing.programs_per_sm)
            yield Cut(name, call, module, {constant: launch})
        for num_warps, num_stages, programs in tried:
            yield Cut(name, call, module, {constant: Launch(standing.tile, num_warps, num_stages, programs)})
    for channels, tokens in ((32, 32), (128, 32), (64, 16), (64, 64)):
        constants = {"KEY_CHANNELS": channels, "VALUE_TOKENS": tokens}
        yield Cut("quantise int4", lambda: inputs.quantised(4, "triton"), quantise_kernel, constants)
    for block_bytes, block_tokens in ((64, 64), (64, 256), (128, 64), (128, 128), (256, 64)):
        constants = {"BLOCK_BYTES": block_bytes, "BLOCK_TOKENS": block_tokens}
        yield Cut(
            "compact half, keys", lambda: compact(moved(inputs), inputs.keep_half, "triton"), compact_kernel, constants
        )


@lru_cache(maxsize=1)
def moved(inputs: Inputs) -> torch.Tensor:
    """Return a copy of the keys that tokens are moved in."""
    return inputs.full.keys.clone()


class Run:
    """Results so far, kept in a file that a new process goes on from."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.file, self.arguments = Path(arguments.state), arguments
        self.state: dict[str, Any] = {"done": [], "checks": [], "times": [], "cuts": [], "errors": []}
        if self.file.exists():
            self.state = json.loads(self.file.read_text())

    def step(self, name: str, work: Callable[[], None]) -> None:
        """Do a step that was not begun before; tell its error and go on."""
        if name in self.state["done"] or time.time() - self.arguments.started > self.arguments.seconds:
            return
        self.state["done"].append(name)
        self.save()
        try:
            work()
            if DEVICE == "cuda":
                torch.cuda.synchronize()
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            told = f"{type(error).__name__}: {str(error).strip()[:600]} ({Path(last.filename).name}:{last.lineno})"
            print(f"FAILED {name}: {told}", flush=True)
            self.state["errors"].append({"step": name, "error": told})
            self.save()
            self.go_on()
        self.save()

    def go_on(self) -> None:
        """Start anew where the GPU no longer answers, as after a bad memory access."""
        if DEVICE == "cuda":
            try:
                torch.zeros(1, device=DEVICE).add_(1).item()
            except Exception:
                print("the GPU no longer answers: going on in a new process", flush=True)
                go_on = ["--state", str(self.file), "--started", str(self.arguments.started)]
                os.execv(sys.executable, [sys.executable, __file__, *sys.argv[1:], *go_on])

    def save(self) -> None:
        self.file.write_text(json.dumps(self.state, indent=1))
        if self.arguments.json:
            Path(self.arguments.json).write_text(json.dumps(self.state, indent=1))

    def check(self, name: str, rows: Callable[[], Iterator[dict[str, Any]]]) -> None:
        """Print and keep the rows of a comparison."""

        def work() -> None:
            # Fresh memory is NaN while this is on, so that what no kernel wrote is seen.
            torch.use_deterministic_algorithms(True, warn_only=True)
            try:
                for row in rows():
                    verdict = "ok   " if row["right"] else "WRONG"
                    found = f"relative {row['relative']:.2e} max {row['max']:.2e}"
                    print(f"  {verdict} {name:28} {row['what']:34} {found}", flush=True)
                    self.state["checks"].append({"check": name} | row)
            finally:
                torch.use_deterministic_algorithms(False)

        self.step(f"check {name}", work)

    def time(self, name: str, make: Callable[[], Callable[[], Any]], num_bytes: Callable[[], int]) -> None:
        """Measure, print and keep an operation's row."""

        def work() -> None:
            call, moved = make(), num_bytes()
            median, how = measure(call)
            known = {row["op"]: row["us"] for row in self.state["times"]}
            row = {"op": name, "us": median, "bytes": moved, "launched": how, "target_us": TARGETS_US.get(name)}
            row["of_copy"] = moved / median / 1e6 / self.state["copy_tb_per_s"]
            attends = name.startswith(("SDPA", "decode", "attend", "quest"))
            for peer in ("SDPA enable_gqa", "SDPA folded"):
                row[f"times {peer}"] = known[peer] / median if attends and peer in known else None
            ratios = "  ".join(
                f"{ratio:5.2f}x {peer}"
                for peer in ("SDPA enable_gqa", "SDPA folded")
                if (ratio := row[f"times {peer}"])
            )
            target = f"target {row['target_us']}" if row["target_us"] else ""
            print(
                f"  {name:26} {median:9.1f} us {moved / 1e9:6.3f} GB {moved / median / 1e6:6.3f} TB/s "
                f"{row['of_copy']:6.1%} of copy  {ratios:48} {how} {target}",
                flush=True,
            )
            self.state["times"].append(row)

        self.step(f"time {name}", work)


def measure_copy(tiny: bool) -> float:
    """Return the bandwidth of a copy on the device in TB/s, bytes read and written."""
    source = torch.randint(0, 255, (2**16 if tiny else 2**31,), dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    median, _ = measure(lambda: target.copy_(source))
    return 2 * source.numel() / median / 1e6


def main() -> None:
    """Check, measure and try cuts, a line at a time; exit with 1 where something failed or is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=32768, help="a multiple of 64")
    parser.add_argument("--pages", type=int, default=128, help="pages of 16 tokens that a head reads")
    parser.add_argument("--seconds", type=float, default=420, help="begin no step after these")
    parser.add_argument("--json", help="write everything there, after every step")
    parser.add_argument("--tiny", action="store_true", help="small tensors")
    parser.add_argument(
        "--state", default=f"{tempfile.gettempdir()}/kernels_gpu_{os.getpid()}.json", help=argparse.SUPPRESS
    )
    parser.add_argument("--started", type=float, default=time.time(), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if DEVICE == "cpu" and not arguments.tiny:
        parser.error("no CUDA device; --tiny runs small tensors under Triton's interpreter")
    run = Run(arguments)
    if "machine" not in run.state:
        name = torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU, interpreter"
        run.state |= {"machine": name, "torch": torch.__version__, "triton": triton.__version__}
        run.state["copy_tb_per_s"] = measure_copy(arguments.tiny)
    print(f"{run.state['machine']}, torch {torch.__version__}, triton {triton.__version__}")
    print(f"copy: {run.state['copy_tb_per_s']:.2f} TB/s", flush=True)
    inputs = (
        Inputs(1, 2, 4, 192, 64, 3)
        if arguments.tiny
        else Inputs(arguments.batch, 8, 4, arguments.tokens, 128, arguments.pages)
    )
    do_checks(run, inputs)
    print("times:", flush=True)
    for operation in timed_ops(inputs):
        run.time(*operation)
    print("checks at other shapes:", flush=True)
    for D, R, stores in OTHER_SHAPES:
        tokens = 192 if arguments.tiny else 4096
        run.check(f"head dim {D}, group {R}", lambda D=D, R=R, stores=stores, S=tokens: check_shape(D, R, S, stores))
    run.step("sanitizer", lambda: run.state.update(sanitizer=sanitize(60)))
    do_cuts(run, inputs)
    for choice in backend_report():
        print(f"backend: {choice.op} on {choice.device}, {choice.dtype}: {choice.backend} ({choice.reason})")
    wrong = [row for row in run.state["checks"] + run.state.get("sanitizer", []) if row["right"] is False]
    skipped = "" if time.time() - arguments.started <= arguments.seconds else "; stopped by --seconds"
    print(f"{len(run.state['checks'])} checks, {len(wrong)} wrong, {len(run.state['errors'])} steps failed{skipped}")
    run.file.unlink(missing_ok=True)
    sys.exit(bool(wrong or run.state["errors"]))


def do_checks(run: Run, inputs: Inputs) -> None:
    """Compare every kernel with its definition."""
    print("checks against the definitions:", flush=True)
    for name, store in (("bfloat16", "full"), ("fp8", "float8")):
        run.check(f"decode {name}", lambda store=store: check_store(inputs, getattr(inputs, store), inputs.query, 1e-2))
    run.check("attend bfloat16", lambda: check_rows(inputs))
    for bits in BITS:
        codes = f"int{bits}"
        run.check(
            f"attend {codes}",
            lambda bits=bits, codes=codes: check_codes(inputs, getattr(inputs, codes), bits, inputs.query),
        )
    run.check("pages", lambda: check_pages(inputs))
    for bits in BITS:
        run.check(f"quantise int{bits}", lambda bits=bits: check_quantize(inputs, bits))
    run.check("compact", lambda: check_compact(inputs))


def do_cuts(run: Run, inputs: Inputs) -> None:
    """Time the decoding kernels in other cuts."""
    print(
        "other cuts (warps, tiles ahead, programs a multiprocessor; channels, tokens; bytes, tokens of a block):",
        flush=True,
    )
    for cut in cuts(inputs):

        def work(cut: Cut = cut) -> None:
            standing = {name: getattr(cut.module, name) for name in cut.constants}
            vars(cut.module).update(cut.constants)
            try:
                median, _ = measure(cut.call, repeats=15)
            finally:
                vars(cut.module).update(standing)
            print(f"  {cut.op:18} {cut.label:12} {median:9.1f} us", flush=True)
            run.state["cuts"].append({"op": cut.op, "cut": cut.label, "us": median})

        run.step(f"cut {cut.op} {cut.label}", work)


if __name__ == "__main__":
    main()
