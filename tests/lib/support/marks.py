"""Where Triton's kernels run in this session: in its interpreter on the CPU, or compiled on a GPU."""

import os

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"

interpreter = pytest.mark.skipif(not INTERPRETED, reason="Triton's interpreter is off: kernels run on the GPU here")
on_device = [] if INTERPRETED else [pytest.mark.gpu]  # a module's `pytestmark`, where its kernels run on DEVICE
