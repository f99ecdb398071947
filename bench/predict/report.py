"""Tables and JSON of predictions."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from statistics import correlation
from typing import Any

from predict.decode import DecodePrediction
from predict.kernel import Prediction
from predict.layer import PASSES, LayerPrediction
from predict.machines import Machine

RESOURCES = ("issue", "alu", "imad", "tensor", "shared", "L2 read", "L2 written", "memory")
MOST_LINES = 12


def _us(seconds: float) -> str:
    return f"{seconds * 1e6:.1f}"


def layer_table(layer: LayerPrediction, machine: Machine, lines: bool = False) -> str:
    """Format the launches of a layer's passes: predicted times in us, by resource at perfect overlap, and simulated."""
    case = layer.case
    rows = [
        f"{case.name}: dropout {layer.dropout:g}, {case.dtype}, {layer.parameters} parameters; predicted us",
        f"{'kernel':<31}{'grid':<15}{'blocks':>7}{'waves':>7}"
        + "".join(f"{name:>11}" for name in RESOURCES)
        + f"{'bound':>8}{'sim':>8}{'copy':>8}{'of copy':>9}  limiter; blocks limited by",
    ]
    details = []
    for each in layer.passes:
        for kernel in each.kernels:
            cells = "".join(f"{_us(machine.seconds(kernel.cycles.get(name, 0.0))):>11}" for name in RESOURCES)
            grid = "x".join(map(str, kernel.grid))
            rows.append(
                f"{kernel.kernel:<31}{grid:<15}{kernel.resident:>7}{kernel.waves:>7.2f}{cells}"
                f"{_us(kernel.bound):>8}{_us(kernel.simulated):>8}{_us(kernel.copy):>8}{kernel.of_copy:>9.0%}  "
                f"{kernel.limiter}; {kernel.limited_by}"
            )
        torch = f", {len(each.torch_seconds)} of torch" if each.torch_seconds else ""
        rows.append(
            f"  {each.name}: {_us(each.seconds)} us in {each.launches} launches{torch}; a copy of its "
            f"{each.bytes / 1e6:.0f} MB is {each.share(machine):.0%} of its time"
        )
        main = max(each.kernels, key=lambda kernel: kernel.simulated)
        details.append(instructions(main, lines))
    rows.append(
        f"layer over linear: {layer.over_linear(machine):.3f} (every kernel at its bound: "
        f"{layer.bound_over_linear(machine):.3f}); adapter {_us(layer.adapter(machine))} us with its starts, linear "
        f"{_us(layer.linear)} us"
    )
    return "\n".join([*rows, *details])


def instructions(kernel: Prediction, lines: bool) -> str:
    """Format the instructions of a kernel's largest loop by class, and those of a warp by source line."""
    classes = ", ".join(f"{name} {count}" for name, count in kernel.loop.items())
    text = f"  {kernel.kernel}: {sum(kernel.loop.values())} instructions an iteration: {classes}"
    if lines:
        for place, count in list(kernel.lines.items())[:MOST_LINES]:
            text += f"\n    {count:>9.0f} {place}"
    return text


def decode_table(steps: list[DecodePrediction]) -> str:
    """Format the waits of each launch's slowest block in a decode step, in us."""
    names = list(next(iter(steps[0].stages.values())))
    head = "".join(f"{name:>20}" for name in names)
    rows = [f"{'decode step: sequences, launch':<32}{head}{'of no adapter':>15}  (predicted us)"]
    for step in steps:
        for launch, stages in step.stages.items():
            cells = "".join(f"{_us(stages[name]):>20}" for name in names)
            rows.append(f"{f'{step.sequences}, {launch}':<32}{cells}{step.of_none:>15.3f}")
    return "\n".join(rows)


@dataclass(frozen=True)
class Predictions:
    """Everything that is predicted for one card and preset."""

    preset: str
    machine: Machine
    layers: list[LayerPrediction]
    steps: list[DecodePrediction]
    copy: Prediction

    @property
    def dropped(self) -> list[LayerPrediction]:
        return [layer for layer in self.layers if layer.dropout]

    @property
    def plain(self) -> list[LayerPrediction]:
        return [layer for layer in self.layers if not layer.dropout]


def summary(found: Predictions) -> dict[str, Any]:
    """Return the figures that the bars are set on."""
    passes = [each for layer in found.plain for each in layer.passes]
    return {
        "what": "predictions of a static model, not measurements",
        "card": found.machine.name,
        "basis": found.machine.basis(),
        "layer": {layer.case.name: round(layer.over_linear(found.machine), 3) for layer in found.dropped},
        "passes": {
            name: round(min(each.share(found.machine) for each in passes if each.name == name), 3) for name in PASSES
        },
        "decode": {str(step.sequences): round(step.of_none, 3) for step in found.steps},
        "copy": round(found.copy.of_copy, 3),
    }


def everything(found: Predictions) -> dict[str, Any]:
    """Return every figure of a run, for `compare`."""
    kernels = {}
    for layer in found.layers:
        for each in layer.passes:
            for number, kernel in enumerate(each.kernels):
                key = f"{layer.case.name}, dropout {layer.dropout:g}, {each.name} {number}: {kernel.kernel}"
                kernels[key] = asdict(kernel)
    return {"preset": found.preset, "summary": summary(found), "kernels": kernels}


def rank_correlation(first: list[float], second: list[float]) -> float:
    """Return Spearman's correlation of two lists, of which neither has a value twice."""
    ranks = [[sorted(values).index(value) for value in values] for values in (first, second)]
    return correlation(*map(lambda each: [float(rank) for rank in each], ranks))


def beside_measured(found: Predictions, rows: list[dict[str, Any]]) -> str:
    """Format predicted times beside those that bench/passes.py measured, rows of its JSON.

    Raises:
        ValueError: fewer than three of the rows are of predicted passes.
    """
    predicted = {
        (layer.case.name, each.name): each.seconds + (each.launches - 1) * found.machine["launch"]
        for layer in found.plain
        for each in layer.passes
    }
    measured = {
        (row["case"], row["pass"]): row["ms"]["median"] / 1e3
        for row in rows
        if row["backend"] == "triton" and (row["case"], row["pass"]) in predicted
    }
    if len(measured) < 3:
        raise ValueError(f"needs three measured passes of Triton's that are predicted, too; got {len(measured)}")
    lines = [f"{'pass':<26}{'predicted us':>14}{'measured us':>14}{'measured / predicted':>22}"]
    for key, value in measured.items():
        ratio = value / predicted[key]
        lines.append(f"{', '.join(key):<26}{_us(predicted[key]):>14}{_us(value):>14}{ratio:>22.2f}")
    order = rank_correlation([predicted[key] for key in measured], list(measured.values()))
    return "\n".join([*lines, f"rank correlation {order:.2f}; the model is of use if it is 0.8 or more"])


def compare(before: dict[str, Any], after: dict[str, Any]) -> str:
    """Format what changed between two files of --output."""
    if (first := before["summary"]["card"]) != (second := after["summary"]["card"]):
        return f"predictions for different cards cannot be compared: {first} and {second}"
    rows = [f"{'predicted, us':<75}{'before':>9}{'after':>9}{'change':>9}  instructions, barriers an iteration"]
    old, new = before["kernels"], after["kernels"]
    for key in [*old, *(key for key in new if key not in old)]:
        if key not in old or key not in new:
            rows.append(
                f"{key:<75}{'-' if key not in old else _us(old[key]['simulated']):>9}"
                f"{'-' if key not in new else _us(new[key]['simulated']):>9}"
            )
            continue
        a, b = old[key], new[key]
        counts = [(sum(x["loop"].values()), x["loop"].get("barrier", 0)) for x in (a, b)]
        rows.append(
            f"{key:<75}{_us(a['simulated']):>9}{_us(b['simulated']):>9}{b['simulated'] / a['simulated'] - 1:>+9.1%}"
            f"  {counts[0][0]} -> {counts[1][0]}, {counts[0][1]} -> {counts[1][1]}"
        )
    for name in ("layer", "passes", "decode"):
        for key, value in after["summary"][name].items():
            rows.append(f"{name + ' ' + key:<75}{before['summary'][name].get(key, '-'):>9}{value:>9}")
    return "\n".join(rows)
