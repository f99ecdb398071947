"""bench/throughput.py: the budget of inner loops, the copy, and the line of JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from support.bench_process import python


def test_inner_loops_keep_their_budget_and_a_copy_its_rate():
    """On sm_90. A loop that gains is looked at, and then its budget renewed."""
    done = python(
        "-c",
        """
import sys
from contextlib import redirect_stderr
from dataclasses import replace
from io import StringIO
import throughput
from predict import budget, layer, machines, report

share = layer.predict_copy(machines.machine("h200")).of_copy
assert 0.95 <= share <= 1.05, share

allowed = {"a": budget.Loop(100, 3)}
complaints = lambda **changes: budget.complaints({"a": replace(allowed["a"], **changes)}, allowed)
assert not complaints() and not complaints(instructions=105) and not complaints(instructions=50, barriers=0)
assert "106" in complaints(instructions=106)[0] and "4 barriers" in complaints(barriers=4)[0]
assert "no budget" in budget.complaints({"b": allowed["a"]}, allowed)[0]

case = type("Case", (), {"name": "gate/up"})
made = lambda name, us: type("Pass", (), {"name": name, "seconds": us / 1e6, "launches": 1})
layer_of = lambda times: type("Layer", (), {"case": case, "passes": [made(n, t) for n, t in times.items()]})
predicted = {"a": 50.0, "b": 40.0, "c": 130.0, "d": 60.0}
found = type("Found", (), {"machine": {"launch": 1e-6}, "plain": [layer_of(predicted)]})
rows = [{"case": "gate/up", "backend": "triton", "pass": n, "ms": {"median": 2e-3 * t}} for n, t in predicted.items()]
text = report.beside_measured(found, [*rows, {"case": "gate/up", "backend": "cuda", "pass": "a", "ms": {"median": 1}}])
assert text.count("2.00") == 4 and "rank correlation 1.00" in text, text
rows[0], rows[2] = ({**rows[i], "ms": rows[j]["ms"]} for i, j in ((0, 2), (2, 0)))
assert "rank correlation 0.20" in report.beside_measured(found, rows), report.beside_measured(found, rows)

for flags in (["--sweep", "shrnk", "BT=64"], ["--sweep", "shrink", "bt=64"], ["--sweep", "shrink", "BT=x"]):
    said = StringIO()
    try:
        with redirect_stderr(said):
            throughput.main(flags)
        raise AssertionError(flags)
    except SystemExit as refused:
        assert refused.code == 2 and (flags[1] if flags[1] == "shrnk" else flags[2].split("=")[1]) in said.getvalue()

sys.exit(throughput.main(["--budget", "check", "--arch", "90"]))
""",
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "8 loops, 0 over budget" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("card", ["h200", "a100"])
def test_the_last_line_is_json(card: str, tmp_path: Path):
    out = tmp_path / "all.json"
    done = python("throughput.py", "--preset", "llava-7b", "--card", card, "--json", "--output", str(out))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Predictions" in done.stdout.splitlines()[0]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["layer"].keys() == {"gate/up", "down"} and all(1 < value < 2 for value in found["layer"].values())
    assert found["passes"].keys() == {"route_shrink", "fuse_expand", "grad_output", "grad_input"}
    assert all(0 < value < 1 for value in found["passes"].values())
    assert found["decode"].keys() == {"1", "8", "64"} and 0.95 <= found["copy"] <= 1.05
    compared = python("throughput.py", "--compare", str(out), str(out))
    assert compared.returncode == 0 and "+0.0%" in compared.stdout


@pytest.mark.slow
def test_inner_loops_on_older_cards_keep_their_budget():
    done = python("throughput.py", "--budget", "check", "--arch", "80")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.mark.slow
def test_a_sweep_ranks_tiles():
    done = python("throughput.py", "--sweep", "expand", "BT=64,128", "warps=8")
    ranked = done.stdout.rsplit("together:", 1)[-1]
    assert done.returncode == 0 and "BT=64 warps=8" in ranked and "BT=128 warps=8" in ranked
