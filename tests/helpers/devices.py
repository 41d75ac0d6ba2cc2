"""The devices of a test: the CPU in the quick tests, and CUDA with `pytest -m gpu` or `make gpu`.

Tests that are marked `gpu` are in files called `test_devices.py`, which `make gpu` collects.
"""

import pytest
import torch

NO_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
CUDA = pytest.param("cuda", marks=[pytest.mark.gpu, NO_CUDA])
DEVICES = ["cpu", CUDA]
