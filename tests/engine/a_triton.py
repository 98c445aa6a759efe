"""Imported before anything that imports Triton: takes its interpreter where there is no GPU, or skips the importing tests."""

import os
from importlib.util import find_spec

import numpy as np
import pytest
import torch

if find_spec("triton") is None:
    pytest.skip("Triton is not installed; the test extra and torch for CUDA bring it", allow_module_level=True)
if not torch.cuda.is_available():
    from importlib.metadata import version

    if version("triton").startswith("3.6") and tuple(map(int, np.__version__.split(".")[:2])) >= (2, 4):
        pytest.skip("the interpreter of Triton 3.6 does not run with numpy 2.4 and newer", allow_module_level=True)
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, and when each kernel is made

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
