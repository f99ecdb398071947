"""One layer and batch for the pytest-benchmark cases: the first shape of `llava-7b` on a GPU, `small` on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch

from accuracy import Errors, check, expect
from peers import PEERS, Peer
from runs import unavailable
from shapes import PRESETS
from timing import Clock, clock_for
from workload import Batch, Layer, draw_batch, draw_layer


@dataclass
class Bench:
    """Peers on one workload; each is checked before it is handed out."""

    layer: Layer
    batch: Batch
    clock: Clock
    made: dict[str, tuple[Peer, Errors]] = field(default_factory=dict)

    def peer(self, name: str) -> tuple[Peer, Errors]:
        device = self.layer.weight.device
        reason = unavailable(name, device, self.layer.case.dtype)
        if reason:
            pytest.skip(reason)
        if name.startswith("compiled") and device.type == "cpu":
            pytest.skip("compiling for a CPU takes longer than all the rest: bench/fused_vs_naive.py --peers compiled")
        if name not in self.made:
            peer = PEERS[name](self.layer)
            self.made[name] = peer, check(name, peer, self.batch, expect(peer.formula, self.layer, self.batch))
        return self.made[name]

    def finished(self, run: Callable[..., object]) -> Callable[..., None]:
        """Wrap `run` so that it returns when the device is done."""

        def wait(*args: object) -> None:
            run(*args)
            self.clock.wait()

        return wait


@pytest.fixture(scope="session")
def bench() -> Bench:
    on_gpu = torch.cuda.is_available()
    case = PRESETS["llava-7b" if on_gpu else "small"][0]
    device = torch.device("cuda" if on_gpu else "cpu")
    layer = draw_layer(case, device)
    return Bench(layer, draw_batch(layer, case.batch, case.seq), clock_for(device))
