"""The benchmark's cases for pytest-benchmark: `pytest bench --benchmark-only`, to track regressions.

The command bench/fused_vs_naive.py interleaves the peers and evicts caches; these are timed one after the other.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from peers import PEERS
from workload import draw_batch

ROUNDS = 7


def extra(benchmark, case, peer, errors) -> None:
    benchmark.extra_info.update(
        case=case.describe(), weights_dtype=peer.weights_dtype, error_y=errors.y, error_grads=errors.grads
    )


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("mode", ["forward", "backward", "both"])
def test_layer(benchmark, bench, mode, name):
    peer, errors = bench.peer(name)
    batch = replace(bench.batch, x=bench.batch.x.detach().requires_grad_())

    def forward():
        with peer.scope():
            return peer(batch)

    def backward(y):
        return torch.autograd.grad(y, [batch.x, *peer.leaves.values()], batch.dy)

    run, setup = {
        "forward": (forward, None),
        "backward": (backward, lambda: ((forward(),), {})),
        "both": (lambda: backward(forward()), None),
    }[mode]
    benchmark.group = f"{bench.layer.case.name}, {mode}"
    extra(benchmark, bench.layer.case, peer, errors)
    benchmark.pedantic(bench.finished(run), setup=setup, rounds=ROUNDS, warmup_rounds=1)


@pytest.mark.parametrize("name", PEERS)
def test_decode_step(benchmark, bench, name):
    peer, errors = bench.peer(name)
    batch = draw_batch(bench.layer, 1, 1)

    def step():
        with torch.no_grad(), peer.scope():
            return peer.step(batch)

    benchmark.group = f"{bench.layer.case.name}, decode step without a graph"
    extra(benchmark, bench.layer.case, peer, errors)
    peer.train(False)
    benchmark.pedantic(bench.finished(step), rounds=10 * ROUNDS, warmup_rounds=3)
    peer.train(True)
