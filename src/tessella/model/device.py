"""Where a model runs and in which number type, chosen by itself or told.

In: "auto" or a name.  Out: torch.device and torch.dtype; and how much memory is free there.
"""

import time
from collections.abc import Sequence
from functools import cache

import psutil
import torch

from tessella.errors import ConfigError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device(name: str = "auto") -> torch.device:
    """ "auto" takes cuda, then mps, then cpu. Raises ConfigError for a device that is not here."""
    have = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind, here in have.items() if here))
    kind = name.split(":")[0]
    if not have.get(kind, False):
        here = ", ".join(kind for kind, is_here in have.items() if is_here)
        raise ConfigError(f'device "{name}" is not on this machine; it has {here}, or say auto')
    device = torch.device(name)
    if kind == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f'device "{name}" is not on this machine; it has {torch.cuda.device_count()} GPU(s), counted from 0')
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """ "auto" takes bfloat16 where the device multiplies it in hardware, else float32. Raises ConfigError."""
    if name == "auto":
        return torch.bfloat16 if has_fast_bfloat16(device) else torch.float32
    if name not in DTYPES:
        raise ConfigError(f'dtype "{name}" is not known; say auto, {", ".join(DTYPES)}')
    return DTYPES[name]


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 matrix products run in hardware there (CPU: AMX or AVX512-BF16) and faster than those of float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return (torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()) and bfloat16_pays()
    return False


SLOWER = 1.3  # bfloat16 products that take so many times as long as float32's are emulated, not multiplied in hardware


@cache
def bfloat16_pays() -> bool:
    """Whether this CPU's bfloat16 products are not clearly slower than float32's. Measured, for what a CPU says is not all: a
    virtual machine or a library may not pass the instructions on, and then bfloat16 takes twice as long, not half.
    """
    seconds = product_seconds((torch.bfloat16, torch.float32))
    return seconds[torch.bfloat16] < SLOWER * seconds[torch.float32]


def product_seconds(dtypes: Sequence[torch.dtype]) -> dict[torch.dtype, float]:
    """The shortest of some products of about a millisecond, by type, in this thread's own time: other programs do not count.

    One thread: on a busy machine two wait for each other, and the first products of a process took eight times as long. The
    types take turns, so that what disturbs one disturbs the other.
    """
    pairs = {dtype: (torch.ones(256, 576, dtype=dtype), torch.ones(576, 576, dtype=dtype)) for dtype in dtypes}
    shortest, threads = dict.fromkeys(dtypes, float("inf")), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(8):  # the first also prepares
            for dtype, (left, right) in pairs.items():
                start = time.thread_time()
                torch.mm(left, right)
                shortest[dtype] = min(shortest[dtype], time.thread_time() - start)
    finally:
        torch.set_num_threads(threads)
    return shortest


def free_bytes(device: torch.device) -> int:
    """Memory that is free on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return int(psutil.virtual_memory().available)
