"""The results of a run: tables on the screen, a JSON file with every row, and time against tokens as a PNG."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from pathlib import Path
from typing import Any

import torch

from peers import OURS

Row = dict[str, Any]
MODES = ("forward", "backward", "both")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def environment(device: torch.device) -> Row:
    """Return the machine and the versions that a row's figures belong to."""
    versions = {package: _version(package) for package in ("torch", "triton", "peft", "smolora")}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name = properties.name
        machine = {"compute_capability": f"{properties.major}.{properties.minor}", "cuda": torch.version.cuda}
    else:
        name = _cpu_name()
        machine = {"threads": torch.get_num_threads(), "cores": os.cpu_count()}
    return {"device": name, "device_type": device.type, "python": platform.python_version(), **versions, **machine}


def _cpu_name() -> str:
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found.group(1) if found else platform.processor() or platform.machine()


def folder_name(device: str) -> str:
    """Return a device's name as a folder's: lower case, no spaces."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def results_folder(asked: Path | None, environment: Row) -> Path:
    """Make and return the folder of the results: the one asked for, else bench/results/<device>."""
    path = asked or Path(__file__).parent / "results" / folder_name(environment["device"])
    path.mkdir(parents=True, exist_ok=True)
    return path


def label(peer: str, method: str = "smolora") -> str:
    return f"{method} {peer}" if peer in OURS else peer


def spread(timing: Row) -> str:
    return f"{timing['median']:.4g} ({timing['p20']:.4g}-{timing['p80']:.4g})"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def layer_table(rows: list[Row]) -> str:
    """Format a line a peer for one case; times in ms, median (20th-80th percentile)."""
    header = (
        f"{'peer':<20}{'forward ms':>27}{'backward ms':>27}{'both ms':>27}{'/ linear':>9}{'overhead':>9}"
        f"{'official/':>10}{'of floor':>9}{'kept MB':>9}{'peak MB':>9}{'err y':>9}{'err dx':>9}{'err grad':>9}"
    )
    second = f"{'':<20}{'':>81}{'(both)':>9}{'(both)':>9}{'overhead':>10}{'(both)':>9}"
    lines = [header, second]
    for row in rows:
        error = row["error"]
        lines.append(
            f"{label(row['peer'], row['method']):<20}"
            + "".join(f"{spread(row[mode]):>27}" for mode in MODES)
            + f"{_number(row['times_linear']['both'], '.2f'):>9}{_number(_median(row['own_ms']['both']), '.2f'):>9}"
            + f"{_number(row['official_own_over_own']['both'], '.1f'):>10}{_number(row['of_floor']['both'], '.0%'):>9}"
            + f"{row['kept_bytes'] / 1e6:>9.1f}{_number(_mega(row['peak_bytes']), '.1f'):>9}"
            + f"{error['y']:>9.1e}{error['dx']:>9.1e}{_number(error['grads'], '.1e'):>9}"
        )
    return "\n".join(lines)


def _median(timing: Row | None) -> float | None:
    return timing and timing["median"]


def _mega(count: int | None) -> float | None:
    return None if count is None else count / 1e6


def decode_table(rows: list[Row]) -> str:
    """Format the time of a decode step in microseconds, and its speed relative to the bare linear layer."""
    batches = sorted({row["shape"]["batch"] for row in rows})
    lines = [f"{'decode step, us':<20}" + "".join(f"{f'{batch} sequence(s)':>38}" for batch in batches)]
    for peer in dict.fromkeys(row["peer"] for row in rows):
        cells = []
        for batch in batches:
            row = next((row for row in rows if row["peer"] == peer and row["shape"]["batch"] == batch), None)
            if row is None:
                cells.append("-")
                continue
            t = row["step"]
            text = f"{t['median'] * 1e3:.1f} ({t['p20'] * 1e3:.1f}-{t['p80'] * 1e3:.1f})"
            cells.append(text + (f"  {1 / row['times_linear']:.2f}x" if row["times_linear"] else ""))
        lines.append(f"{label(peer, rows[0]['method']):<20}" + "".join(f"{cell:>38}" for cell in cells))
    return "\n".join(lines)


def sum_table(title: str, rows: list[Row]) -> str:
    """Format forward + backward of an FFN block: the sums over its layers, and their ratios."""
    peers = list(dict.fromkeys(row["peer"] for row in rows))
    whole = {p: sum(row["shape"]["ffn"] * row["both"]["median"] for row in rows if row["peer"] == p) for p in peers}
    cases = {row["case"] for row in rows}
    complete = [p for p in peers if {row["case"] for row in rows if row["peer"] == p} == cases]
    overheads = {
        p: sum(row["shape"]["ffn"] * row["own_ms"]["both"]["median"] for row in rows if row["peer"] == p)
        for p in (complete if "linear" in complete else [])
        if p != "linear"
    }
    linear, official = (whole[p] if p in complete else None for p in ("linear", "official"))
    method = rows[0]["method"]
    lines = [f"{title:<32}{'both ms':>10}{'/ linear':>10}{'overhead':>10}{'official /':>12}{'official overhead /':>20}"]
    for peer in complete:
        overhead = overheads.get(peer)
        ratio = overheads["official"] / overhead if "official" in overheads and overhead and overhead > 0 else None
        lines.append(
            f"{label(peer, method):<32}{whole[peer]:>10.3f}{_number(linear and whole[peer] / linear, '.2f'):>10}"
            f"{_number(overhead, '.3f'):>10}{_number(official and official / whole[peer], '.2f'):>12}"
            f"{_number(ratio, '.1f'):>20}"
        )
    return "\n".join(lines)


def plot(path: Path, rows: list[Row], title: str) -> None:
    """Plot forward + backward against the number of tokens, a line a peer, 20th to 80th percentile shaded.

    Without matplotlib it says how to install it, and nothing is plotted.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no plot, which needs matplotlib: pip install 'smolora[report]'")
        return
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axes = figure.subplots()
    for peer in dict.fromkeys(row["peer"] for row in rows):
        points = sorted((row["tokens"], row["both"]) for row in rows if row["peer"] == peer)
        tokens = [t for t, _ in points]
        style = {"linewidth": 2.5, "marker": "o"} if peer in OURS else {"linewidth": 1.2, "marker": "."}
        if peer == "linear":
            style |= {"color": "black", "linestyle": "--"}
        (line,) = axes.plot(tokens, [t["median"] for _, t in points], label=label(peer, rows[0]["method"]), **style)
        axes.fill_between(
            tokens, [t["p20"] for _, t in points], [t["p80"] for _, t in points], color=line.get_color(), alpha=0.15
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("tokens T")
    axes.set_ylabel("forward + backward, ms")
    axes.set_title(title, fontsize=9)
    axes.grid(True, which="both", alpha=0.25)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=140)
    print(f"plot: {path}")
