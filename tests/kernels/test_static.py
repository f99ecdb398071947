"""Every kernel compiles without spills for cards that are not here.

These runs compile sm_90 with every half-precision tile of SMoLoRA and with the other mixes, and the other
architectures with the paper's setting in bfloat16 and float32. All mixes, tiles and options on all architectures are
for `make kernels`.
"""

import json
from pathlib import Path

import pytest
import torch

from smolora.kernels import tiles
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
    check_resident(rows)
    products = [row for row in rows if row["kernel"].endswith("_kernel") and row["half"]]
    assert sum(row["tensor_core"] > 0 for row in products) >= 4 * len(architectures)
    assert all(row["wide_loads"] > 0 for row in products if row["kernel"] == "grad_output_kernel")


def check_resident(rows: list[dict]) -> None:
    """A processor of an A100 or an H100 runs as many programs at once as the tile says (65,536 registers, given out by
    256 a warp, and 164 or 228 KB of shared memory, 1 KB of it for each program)."""
    names = {"shrink_kernel": "shrink", "fuse_expand_kernel": "expand", "grad_output_kernel": "grad_output"}
    for row in rows:
        if row["arch"] not in (80, 90) or row["kernel"] not in names or not row["setting"].endswith(" r=16"):
            continue
        name, dtype = names[row["kernel"]], torch.bfloat16 if row["half"] else torch.float32
        slots, variant = (4, "masks") if name == "shrink" else (1, "")
        tile = tiles.choose_tile(name, 16, slots, dtype, (row["arch"] // 10, 0), variant)
        by_registers = 65536 // (-(-row["registers"] // 8) * 256) // tile.warps
        by_shared = {80: 164, 90: 228}[row["arch"]] * 1024 // (row["shared"] + 1024)
        assert min(by_registers, by_shared) >= tile.resident, row


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


def test_launches_of_any_batch():
    """Other numbers of tokens and sequences launch the same code. 70,000 sequences have a grid that CUDA takes, and on
    an A100 no kernel of a training step leaves more than a fifth of the card idle."""
    done = python(
        "-c",
        """
import math
from unittest import mock
import kernel_report as report
from smolora.kernels import tiles
batches = [dict(tokens=8192), dict(tokens=3000, num_seqs=3), dict(tokens=64, num_seqs=16)]
batches.append(dict(tokens=90_000, num_seqs=40))
for plain in (report.PLAIN, report.SOFTMAX):
    launches = report.launches_for(80, [plain.but(**batch) for batch in batches])
    of_one = report.launches_for(80, [plain])
    assert set(launches) == set(of_one), set(launches) ^ set(of_one)
grids = []
def launcher(kernel, grid):
    def launch(**arguments):
        grids.append((kernel.__name__, grid))
    return launch
card = report.Card((8, 0), 108)
def run(setting):
    grids.clear()
    with mock.patch.object(report.JITFunction, "__getitem__", launcher):
        for module in (report.route_shrink, report.fuse_expand, report.grad_output, report.grad_input, report.products):
            module.card_of = lambda device: card
        report.run_layer(setting)
run(report.PLAIN.but(tokens=70_000, num_seqs=70_000, d=16, k=16))
assert len(grids) > 9 and all(side <= 65535 for _, grid in grids for side in grid[1:]), grids
for d, k in ((4096, 11008), (11008, 4096)):
    run(report.PLAIN.but(d=d, k=k))
    names = {"shrink_kernel": "shrink", "fuse_expand_kernel": "expand", "grad_output_kernel": "grad_output"}
    names["grad_input_kernel"] = "grad_input"
    for kernel, grid in grids:
        if kernel in names:
            slots = 4 if kernel == "shrink_kernel" else 1
            tile = tiles.choose_tile(names[kernel], 16, slots, report.PLAIN.dtype, card.capability)
            waves = math.prod(grid) / (tile.resident * card.processors)
            assert waves / math.ceil(waves) >= 0.75 and waves >= 0.8, (kernel, grid, waves)
""",
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_failure_shows():
    """What these tests run in a process of its own fails them."""
    done = python("-c", "print('before')\nassert False, 'told'")
    assert done.returncode == 1 and done.stdout == "before\n" and done.stderr.endswith("AssertionError: told\n")


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
