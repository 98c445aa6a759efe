"""Where a model runs and in which type: what the machine says of itself, and what it does."""

import pytest
import torch

from tessella.model import device as devices

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("amx", "avx512_bf16", "pays", "chosen"),
    [
        (True, False, True, torch.bfloat16),
        (False, True, True, torch.bfloat16),
        (False, True, False, torch.float32),  # it says that it can, but the product takes longer
        (True, True, False, torch.float32),
        (False, False, True, torch.float32),  # emulated
    ],
)
def test_auto_takes_bfloat16_where_the_cpu_has_it_and_it_pays(
    amx: bool, avx512_bf16: bool, pays: bool, chosen: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    seconds = {torch.bfloat16: 1.0, torch.float32: 2.0 if pays else 0.5}
    monkeypatch.setattr(devices, "product_seconds", lambda dtypes: {dtype: seconds[dtype] for dtype in dtypes})
    devices.bfloat16_pays.cache_clear()
    try:
        assert devices.choose_dtype("auto", CPU) == chosen
        assert devices.choose_dtype("float32", CPU) == torch.float32
        assert devices.choose_dtype("bfloat16", CPU) == torch.bfloat16  # told is told
    finally:
        devices.bfloat16_pays.cache_clear()


def test_a_product_takes_some_time_and_the_threads_are_left_as_they_were() -> None:
    threads = torch.get_num_threads()
    seconds = devices.product_seconds((torch.float32, torch.bfloat16))
    assert all(0 < one < 10 for one in seconds.values()) and torch.get_num_threads() == threads
