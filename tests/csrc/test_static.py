"""Every CUDA kernel compiles without spills for a card that is not here.

This compiles sm_90a; the other architectures are for `make kernels`.
"""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import cuda_report

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(cuda_report.find_nvcc() is None, reason="needs nvcc, and there is none")
def test_no_faults(tmp_path: Path):
    """No spill and no stack, tensor cores in 16-bit products, 16-byte accesses in every product and in decoding."""
    out = tmp_path / "rows.json"
    done = subprocess.run(
        [sys.executable, "cuda_report.py", "--arch", "90a", "--workers", "1", "--json", str(out)],
        cwd=ROOT / "bench",
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = json.loads(out.read_text())
    kernels = {row["kernel"] for row in rows}
    assert {"decode_kernel", "shrink_kernel", "expand_kernel", "outer_kernel", "mix_backward_kernel"} <= kernels
    for row in rows:
        assert row["registers"] > 0 and row["spills"] == row["stack"] == row["spill_bytes"] == 0
    products = [row for row in rows if row["kernel"] in cuda_report.PRODUCTS]
    assert {row["types"].split()[0] for row in products} == {"bf16", "fp16", "float"}
    assert all(row["wide"] > 0 and (row["tensor_core"] > 0) == ("float" not in row["types"]) for row in products)


def test_faults_are_named():
    row = cuda_report.Row("90a", "", "outer_kernel", "bf16 4 1", 128, 0, 0, 0, 0, 8, 8)
    faults = lambda **changes: " ".join(replace(row, **changes).faults())  # noqa: E731
    assert not faults()
    assert "spill" in faults(spills=1) and "stack" in faults(stack=8) and "spill" in faults(spill_bytes=8)
    assert "tensor-core" in faults(tensor_core=0) and not faults(tensor_core=0, types="float 4 1")
    assert "16 bytes" in faults(wide=0) and "registers" in faults(registers=257)


@pytest.mark.parametrize(
    ("mangled", "expected"),
    [
        ("_ZN41_GLOBAL__N__7_9_decode_cu_5113decode_kernelI13__nv_bfloat16EEv6Decode", ("decode_kernel", "bf16")),
        ("_ZN3_GLOBAL__N__2_6_mix_cu_510mix_kernelIf7SmoloraEEv3Mix", ("mix_kernel", "float Smolora")),
        ("_ZN3_GLOBAL__N__2_6_mix_cu_510mix_kernelI13__nv_bfloat168WeightedEEv3Mix", ("mix_kernel", "bf16 Weighted")),
        (
            "_ZN3_GLOBAL__N__2_6_g_cu_5119mix_backward_kernelI8WeightedLb1EEEv10GradOutput",
            ("mix_backward_kernel", "Weighted 1"),
        ),
        ("_Z13shrink_kernelIfLi8EEv6Shrink", ("shrink_kernel", "float 8")),
        ("_Z12outer_kernelI6__halfLi2ELb1EEv5Outer", ("outer_kernel", "fp16 2 1")),
        ("_ZN41_GLOBAL__N__x_9_y_cu_5120reduce_chunks_kernelE12ReduceChunks", ("reduce_chunks_kernel", "")),
    ],
)
def test_kernel_names(mangled: str, expected: tuple[str, str]):
    assert cuda_report.split_name(mangled) == expected
