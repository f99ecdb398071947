"""Machine figures, and the file of a calibration run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from predict.machines import CARDS, FIGURES, machine


@pytest.mark.parametrize("name", CARDS)
def test_every_figure_has_a_source_and_is_assumed_without_a_calibration(name: str, tmp_path: Path):
    card = machine(name, tmp_path)
    assert all(source for _, source, *_ in FIGURES.values()) and set(card.figures) == set(FIGURES)
    assert "assumed" in card.basis() and not card.measured


def test_a_calibration_takes_the_place_of_assumptions(tmp_path: Path):
    (tmp_path / "h200.json").write_text(json.dumps({"figures": {"l2_latency": 300.0}}))
    card = machine("h200", tmp_path)
    assert card["l2_latency"] == 300 and card["memory_latency"] == FIGURES["memory_latency"][2]
    assert "l2_latency" in card.basis() and "calibrated" in card.basis()


@pytest.mark.parametrize("figures", [{"l2_latncy": 300.0}, {"l2_latency": 0.0}])
def test_a_calibration_with_a_fault_is_refused(figures: dict[str, float], tmp_path: Path):
    (tmp_path / "a100.json").write_text(json.dumps({"figures": figures}))
    with pytest.raises(ValueError, match="l2_lat"):
        machine("a100", tmp_path)


@pytest.mark.parametrize(
    ("registers", "warps", "shared", "blocks"),
    [(128, 8, 0, 2), (96, 8, 0, 2), (64, 8, 0, 4), (32, 4, 100 * 1024, 2), (16, 1, 0, 32)],
)
def test_resident_blocks(registers: int, warps: int, shared: int, blocks: int):
    assert min(machine("h200", Path("none")).resident_blocks(registers, warps, shared).values()) == blocks
