"""Every Triton kernel of the engine, compiled for an H200 without one: registers, spills, shared memory, how it loads.

    python bench/kernels.py --families InternVL2-2B InternVL2-1B --dtypes bfloat16 --json kernels.json

Each kernel is launched as the engine launches it, with tensors of a family's shapes, but the launch ends with the machine code;
so what is compiled here is what a GPU will run, alignment and all. Prints a table, and ends with 1 when something does not fit.
"""

import json
import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
import tyro
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from tessella.engine.kernels import attend, steps
from tessella.engine.kernels.attend import HeadNorms, Heads, Turn
from tessella.engine.kernels.products import product
from tessella.engine.kernels.prompts import QUERIES_AT_ONCE, Plan, look_back
from tessella.engine.kernels.sight import activate, norm_of, scale_add_norm
from tessella.model.layers import RMSNorm

REGISTERS, SHARED_BYTES, THREADS, PROGRAMS = 65_536, 232_448, 2_048, 32  # of one multiprocessor of compute capability 9.0
MOST_REGISTERS = 255  # of one thread
BLOCK_TOKENS = 64


class Family(NamedTuple):
    """The shape of a decoder."""

    width: int
    between: int  # the MLP's width
    heads: Heads
    vocabulary: int
    bias: bool = False
    head_norms: bool = False


FAMILIES = {
    "InternVL2-1B": Family(896, 4864, Heads(14, 2, 64), 151655, bias=True),
    "InternVL2-2B": Family(2048, 8192, Heads(16, 8, 128), 92553),
    "InternVL2-4B": Family(3072, 8192, Heads(32, 32, 96), 32020),
    "InternVL2-8B": Family(4096, 14336, Heads(32, 8, 128), 92553),
    "InternVL2-26B": Family(6144, 16384, Heads(48, 8, 128), 92553),
    "InternVL2-40B": Family(7168, 20480, Heads(56, 8, 128), 64000),
    "InternVL2-76B": Family(8192, 28672, Heads(64, 8, 128), 128265),
    "InternVL3_5-1B": Family(1024, 3072, Heads(16, 8, 128), 151936, head_norms=True),
    "LLaVA-1.5-7B": Family(4096, 11008, Heads(32, 32, 128), 32064),
    "tessella-nano": Family(576, 1536, Heads(9, 3, 64), 49160),
    "16 heads to a key head": Family(4096, 13696, Heads(32, 2, 128), 151552, bias=True),
}


@dataclass(frozen=True)
class Options:
    families: tuple[str, ...] = tuple(FAMILIES)
    dtypes: tuple[str, ...] = ("bfloat16", "float16")  # in float32 the engine runs without them
    json: Path | None = None


@dataclass(frozen=True)
class Compiled:
    """One kernel for one shape."""

    kernel: str
    family: str
    dtype: str
    registers: int  # of a thread
    spilled_bytes: int  # of a thread, stack and local memory
    shared_bytes: int  # of a program
    threads: int
    loads: dict[str, int]  # how many of each kind the machine code has

    @property
    def side_by_side(self) -> int:
        """Programs that one multiprocessor holds."""
        registers = -(-self.registers // 8) * 8 * self.threads  # given out by eights
        return min(REGISTERS // registers, SHARED_BYTES // max(self.shared_bytes, 1), THREADS // self.threads, PROGRAMS)

    @property
    def fits(self) -> bool:
        return self.registers <= MOST_REGISTERS and not self.spilled_bytes and self.side_by_side >= 1


class NoGpu:
    """What Triton asks its driver before it compiles."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def compiled(deed: Callable[[], object], family: str, dtype: str) -> list[Compiled]:
    """The kernels that a deed launches; none is run."""
    found: list[tuple[str, Any]] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **sizes: Any) -> Any:
        assert all(0 < side < 2**31 for side in grid) and all(side < 65_536 for side in grid[1:]), f"a grid of {grid}"
        kernel = run(self, *args, grid=grid, warmup=True, **sizes)
        found.append((self.fn.__name__, kernel))
        return kernel

    driver.set_active(NoGpu())
    JITFunction.run = compile_only
    try:
        deed()
    finally:
        JITFunction.run = run
    return [read(name, kernel, family, dtype) for name, kernel in found]


def read(name: str, kernel: Any, family: str, dtype: str) -> Compiled:
    """What stands in the machine code."""
    with tempfile.TemporaryDirectory() as home:
        cubin = Path(home) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        usage, code = (told_by_cuobjdump(flag, cubin) for flag in ("--dump-resource-usage", "-sass"))
    registers, stack, local = (int(re.search(rf"{word}:(\d+)", usage)[1]) for word in ("REG", "STACK", "LOCAL"))  # type: ignore[index]
    kinds = re.findall(r"\b(LDG(?:STS)?)\.\S*?(128|64|U16|U8)?;?\s", code)
    loads: dict[str, int] = {}
    for kind, width in kinds:
        loads[f"{kind} {width or 32}"] = loads.get(f"{kind} {width or 32}", 0) + 1
    spills = len(re.findall(r"\b(STL|LDL)\b", code))
    return Compiled(
        name, family, dtype, registers, stack + local + spills, kernel.metadata.shared, 32 * kernel.metadata.num_warps, loads
    )


def told_by_cuobjdump(flag: str, cubin: Path) -> str:
    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([str(program), flag, str(cubin)], capture_output=True, text=True, check=True).stdout


def launches(family: Family, dtype: torch.dtype) -> None:
    """Each kernel of a decode step of one row and of many, and of a prompt. Weights are address space that nobody touches."""

    def empty(*shape: int, of: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=of)

    width, between, heads, vocabulary = family[:4]
    keys, values = empty(4, heads.shared, BLOCK_TOKENS, heads.width), empty(4, heads.shared, BLOCK_TOKENS, heads.width)
    norms = HeadNorms(empty(heads.width), empty(heads.width), 1e-6) if family.head_norms else None
    cosine, sine = empty(4096, heads.width), empty(4096, heads.width)
    for rows in (1, 512):
        places, table = empty(rows, of=torch.int32), empty(rows, 128, of=torch.int32)
        turn = Turn(cosine, sine, places)
        attend.grow(empty(rows, heads.columns), heads, turn, norms, keys, values, table, places)
    attend.turn_and_put(empty(512, heads.columns), heads, turn, norms, empty(512, of=torch.int64), keys, values)
    for queries in QUERIES_AT_ONCE.values():
        plan = Plan(empty(3, 9, of=torch.int32), empty(9, of=torch.int32), queries)
        look_back(empty(512, heads.columns), heads, plan, keys, values, empty(4, 128, of=torch.int32))
    one, norm = empty(1, width), empty(width)
    product(one, empty(heads.columns, width), norm=norm, eps=1e-6, bias=empty(heads.columns) if family.bias else None)
    product(empty(1, heads.query * heads.width), empty(width, heads.query * heads.width), residual=one)
    product(one, empty(2 * between, width), norm=norm, eps=1e-6, gated=True)
    product(empty(1, between), empty(width, between), residual=one)
    product(one, empty(vocabulary, width))
    steps.rms_norm(one, norm, 1e-6)
    steps.add_norm(empty(8, width), empty(8, width), norm, 1e-6)
    steps.gate(empty(8, 2 * between))
    steps.read(empty(8, of=torch.int32), empty(8, of=torch.int32), empty(8, of=torch.int64), empty(vocabulary, width))
    steps.likeliest(empty(8, -(-vocabulary // 64) * 64)[:, :vocabulary], empty(8, of=torch.int64), empty(8, of=torch.int64))
    seen, sight = empty(8, 1024), torch.nn.LayerNorm(1024, dtype=dtype)  # InternViT-300M, and the norms of InternViT-6B
    scale_add_norm(seen, empty(8, 1024), empty(1024), sight)
    norm_of(empty(8, 3200), RMSNorm(3200, 1e-6).to(dtype))
    for quick in (False, True):
        activate(empty(8, 4096), quick=quick)


def main(options: Options) -> int:
    rows: list[Compiled] = []
    for name in options.families:
        for dtype in options.dtypes:
            rows += compiled(lambda name=name, dtype=dtype: launches(FAMILIES[name], getattr(torch, dtype)), name, dtype)  # type: ignore[misc]
    print(f"triton {triton.__version__}, compute capability 9.0\n")
    print("| kernel | family | | registers | spilled | shared | threads | side by side | loads |\n| --- " + "| --- " * 8 + "|")
    for row in rows:
        loads = ", ".join(f"{count} {kind}" for kind, count in row.loads.items())
        print(
            f"| {row.kernel} | {row.family} | {row.dtype} | {row.registers} | {row.spilled_bytes} | {row.shared_bytes:,} "
            f"| {row.threads} | {row.side_by_side} | {loads} |"
        )
    if options.json:
        told = [asdict(row) | {"side_by_side": row.side_by_side, "fits": row.fits} for row in rows]
        options.json.write_text(json.dumps({"triton": triton.__version__, "kernels": told}, indent=1) + "\n", encoding="utf-8")
    return 0 if all(row.fits for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main(tyro.cli(Options)))
