"""Every kernel compiles without spills for cards that are not here.

These runs compile sm_90 with every half-precision tile of SMoLoRA and with the other mixes, and the other
architectures with the paper's setting in bfloat16 and float32. All mixes, tiles and options on all architectures are
for `make kernels`.
"""

import json
from pathlib import Path

import pytest

from support.bench_process import python


@pytest.mark.parametrize(
    ("architectures", "groups", "at_least"),
    [
        pytest.param(["90"], ["tiles"], 40, id="sm_90, all half-precision tiles"),
        pytest.param(["90"], ["mixes"], 25, id="sm_90, the other mixes"),
        pytest.param(["80"], ["plain"], 15, id="sm_80"),
        pytest.param(["100", "120"], ["plain"], 30, id="sm_100 and 120"),
    ],
)
def test_no_faults(architectures: list[str], groups: list[str], at_least: int, tmp_path: Path):
    """No spill and no stack, shared memory that the card has, half-precision products on tensor cores, and 64-bit
    addresses into everything that grows with the tokens."""
    out = tmp_path / "rows.json"
    done = python(
        "kernel_report.py", "--arch", *architectures, "--groups", *groups, "--workers", "1", "--json", str(out)
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = json.loads(out.read_text())["rows"]
    assert len(rows) >= at_least
    for row in rows:
        assert row["registers"] > 0 and row["spills"] == row["stack"] == row["narrow"] == 0
    products = [row for row in rows if row["kernel"].endswith("_kernel") and row["half"]]
    assert sum(row["tensor_core"] > 0 for row in products) >= 4 * len(architectures)
    assert all(row["wide_loads"] > 0 for row in products if row["kernel"] == "grad_output_kernel")


def test_tiles_that_have_spilled():
    """Routers that learn beside two masks on sm_90; and two banks of 16 columns on sm_120, where ptxas chose a tighter
    limit of registers than it needed."""
    done = python(
        "-c",
        """
import kernel_report as report
for arch, kernel, setting in (
    (90, "grad_input_kernel", report.PLAIN.but(masked=True, learns=True)),
    (120, "shrink_kernel", report.PLAIN.but(shared=True, top_k=2, learns=True)),
):
    batch = [pair for pair in report.launches_for(arch, [setting]).items() if pair[0].kernel.name == kernel]
    rows = report.compile_batch(arch, batch)
    assert rows and not any(row.faults() for row in rows), [row.faults() for row in rows]
""",
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_banks_share_their_code():
    """One kernel for both banks: Triton would specialise the number of the second, 1, if it were let."""
    done = python(
        "-c",
        """
import kernel_report as report
from collections import Counter
launches = Counter(launch.kernel.name for launch in report.launches_for(90, [report.PLAIN]))
assert launches["reduce_dA_kernel"] == launches["reduce_dB_kernel"] == 1, launches
""",
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_report_finds_faults():
    """A tile that is too large spills, and each kind of fault is named."""
    done = python(
        "-c",
        """
import kernel_report as report
from smolora.kernels import tiles
rows = report.Row(90, "shrink_kernel", "", 4, 255, 0, 0, 0, 0, 0, 0, 0, True, "")
faults = lambda **changes: " ".join(report.replace(rows, **changes).faults())
assert "tensor-core" in faults() and not faults(tensor_core=1)
assert "spill" in faults(tensor_core=1, spills=2) and "stack" in faults(tensor_core=1, stack=8)
assert "shared" in faults(tensor_core=1, shared=10**6) and "32-bit" in faults(tensor_core=1, narrow=1)
for name in ("x_ptr", "part_ptrs", "part_ptrs_0"):
    for offset, narrow in (("i32", 1), ("i64", 0)):
        code = f"tt.func @k(%{name}: !tt.ptr<f32>)\\n %a = tt.addptr %{name}, %b : !tt.ptr<f32>, {offset}\\n tt.load %a"
        assert report.count_narrow(code) == narrow, code
right = tiles.choose_tile
def oversized(kernel, *rest, **options):
    tile = right(kernel, *rest, **options)
    return report.replace(tile, BT=128, BD=128, warps=4, registers=255) if kernel == "grad_output" else tile
tiles.choose_tile = oversized
launches = report.launches_for(90, [report.EXACT])
batch = [(launch, s) for launch, s in launches.items() if launch.kernel.name == "grad_output_kernel"]
(row,) = report.compile_batch(90, batch[:1])
assert row.spills and row.faults(), row
""",
    )
    assert done.returncode == 0, done.stderr[-3000:]
