"""Tiles of a kernel, each tried in the place of the one in smolora.kernels.tiles."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from itertools import product
from typing import Any
from unittest import mock

from predict.layer import predict_layer
from predict.machines import Machine
from shapes import SMoLoRACase
from smolora.kernels import tiles

# the pass that a tile is of
PASS_OF = {
    "shrink": "route_shrink",
    "reduce_split_k": "route_shrink",
    "expand": "fuse_expand",
    "grad_output": "grad_output",
    "mix_backward": "grad_output",
    "grad_input": "grad_input",
}


def parse(words: list[str]) -> tuple[str, list[dict[str, Any]]]:
    """Read `KERNEL FIELD=VALUE,VALUE ...`; return the kernel, and every combination of the values.

    Raises:
        ValueError: the kernel or a field is unknown, or a value is no number.
    """
    kernel, *rest = words
    known = {field.name for field in fields(tiles.Tile)} - {"max_columns"}
    if kernel not in PASS_OF:
        raise ValueError(f"kernel must be one of {', '.join(PASS_OF)}, got {kernel!r}")
    choices = {}
    for word in rest:
        name, _, values = word.partition("=")
        if name not in known:
            raise ValueError(f"a field must be one of {', '.join(sorted(known))}, got {word!r}")
        choices[name] = [None if value == "none" else int(value) for value in values.split(",")]
    return kernel, [dict(zip(choices, values, strict=True)) for values in product(*choices.values())]


@contextmanager
def tile_changed(kernel: str, changes: dict[str, Any]) -> Iterator[None]:
    """Let a kernel's tile have other fields."""
    choose = tiles.choose_tile

    def chosen(name: str, *rest: Any, **options: Any) -> tiles.Tile:
        tile = choose(name, *rest, **options)
        return replace(tile, **changes) if name == kernel else tile

    with mock.patch.object(tiles, "choose_tile", chosen):
        yield


def run(what: tuple[str, list[dict[str, Any]]], cases: list[SMoLoRACase], machine: Machine) -> None:
    """Print the predictions of each tile as they come, then all of them in the order of their times."""
    kernel, candidates = what
    name = PASS_OF[kernel]
    ranked = []
    for changes in candidates:
        label = " ".join(f"{field}={value}" for field, value in changes.items()) or "as it is"
        cells, total = [], 0.0
        try:
            for dropout, parameters in ((0.05, "bfloat16"), (0.0, "float32")):
                for case in cases:
                    with tile_changed(kernel, changes):
                        (each,) = predict_layer(case, machine, dropout, parameters, only=(name,)).passes
                    main = max(each.kernels, key=lambda k: k.simulated)
                    total += each.seconds * case.ffn if dropout else 0.0
                    cells.append(
                        f"{case.name} {dropout:g}: pass {each.seconds * 1e6:.1f} us, {each.share(machine):.0%} of copy"
                        f" ({main.kernel} {main.simulated * 1e6:.1f}, {main.resident} blocks, {main.waves:.2f} waves, "
                        f"{main.registers} registers, {main.loop.get('local', 0)} spills)"
                    )
        except Exception as error:  # a tile that does not compile raises anything: the others are tried
            print(f"{label}: {type(error).__name__}: {error}"[:300], flush=True)
            continue
        ranked.append((total, label))
        print(f"{label}\n  " + "\n  ".join(cells), flush=True)
    print(f"\npredicted us of {name} at dropout 0.05, gate, up and down together:")
    for total, label in sorted(ranked):
        print(f"{total * 1e6:>9.1f}  {label}")
