"""D-MoLE's router against its equations in float64, and what it decides."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from smolora.methods.autoencoder_router import AutoencoderRouter, _train, vote_shares
from smolora.methods.selector import Features

T, IMAGE, TEXT, HIDDEN = 4, 14, 10, 16


def samples(task: int, n: int = 60, seed: int = 0) -> Features:
    """Features of a task: near one of a few directions that are its own."""
    draw = torch.Generator().manual_seed(seed * 10 + task)
    chosen, parts = torch.randint(3, (n,), generator=draw), []
    for dim in (IMAGE, TEXT):
        centres = torch.randn(3, dim, generator=torch.Generator().manual_seed(100 * dim + task))
        parts.append(centres[chosen] + 0.15 * torch.randn(n, dim, generator=draw))
    return Features(*parts)


def noise(n: int) -> Features:
    """Features that are far from those of any task."""
    draw = torch.Generator().manual_seed(1)
    return Features(torch.randn(n, IMAGE, generator=draw), torch.randn(n, TEXT, generator=draw))


def joined(*parts: Features) -> Features:
    return Features(*(torch.cat(part) for part in zip(*parts, strict=True)))


@pytest.fixture(scope="module")
def router() -> AutoencoderRouter:
    """Fitted to tasks 0 to 2; task 3 is not there yet."""
    router = AutoencoderRouter(T, IMAGE, TEXT, HIDDEN)
    for task in range(3):
        router.fit(task, samples(task, 150), max_epochs=400, seed=task)
    return router


def by_hand(router: AutoencoderRouter, features: Features) -> list[int]:
    """The task of each sample, one by one in float64."""
    own = {name: buffer.double().numpy() for name, buffer in router.named_buffers()}
    chosen = []
    for image, text in zip(*(part.double().numpy() for part in features), strict=True):
        x = np.concatenate([image / max(np.linalg.norm(image), 1e-12), text / np.linalg.norm(text)])
        x = x / np.linalg.norm(x)
        errors = {}
        for task in range(T):
            if own["threshold"][task] < 0:
                continue
            hidden = np.maximum(own["encoder"][task] @ x + own["encoder_bias"][task], 0)
            output = 1 / (1 + np.exp(-(own["decoder"][task] @ hidden + own["decoder_bias"][task])))
            error = np.mean((output - x) ** 2)
            if error < own["threshold"][task]:
                errors[task] = error
        chosen.append(min(errors, key=errors.get) if errors else -1)
    return chosen


def test_routes_as_float64(router):
    """Samples of each task, of a task that is not there, and noise."""
    features = joined(*(samples(task, 40, seed=1) for task in range(4)), noise(40))
    features.image[::7] = 0  # samples without an image
    found = router.select(features)
    assert found.tolist() == by_hand(router, features)
    assert {*found.tolist()} == {-1, 0, 1, 2}


def test_finds_the_task_of_new_samples(router):
    """The threshold is a quantile of the task's own errors: most of its new samples stay below, others above."""
    for task in range(3):
        found = router.select(samples(task, 200, seed=7))
        assert (found == task).float().mean() > 0.8
        assert ((found == task) | (found == -1)).all()
    assert (router.select(samples(3, 200)) == -1).float().mean() > 0.6
    assert (router.errors(samples(0))[:, 3].isinf()).all()


def test_the_threshold_is_the_quantile():
    router, features = AutoencoderRouter(2, IMAGE, TEXT, HIDDEN), samples(0, 101)
    for quantile in (0.1, 0.5, 1.0):
        router.fit(0, features, quantile=quantile, max_epochs=20)
        below = (router.errors(features)[:, 0] < router.threshold[0]).sum()
        assert int(below) == round(quantile * 100)


def test_fitting_learns_and_repeats():
    """The same bits from the same seed, a lower error from more epochs, and no trace on other tasks."""
    routers = [AutoencoderRouter(3, IMAGE, TEXT, HIDDEN) for _ in range(3)]
    epochs = [r.fit(1, samples(0), max_epochs=n, seed=5) for r, n in zip(routers, (60, 60, 1), strict=True)]
    assert epochs == [60, 60, 1]
    for name, buffer in routers[0].named_buffers():
        assert torch.equal(buffer, routers[1].get_buffer(name))
        assert name == "companion" or not torch.equal(buffer[1], routers[2].get_buffer(name)[1])
    assert not routers[0].encoder[[0, 2]].any() and routers[0].threshold[[0, 2]].tolist() == [-1, -1]
    long, short = (r.errors(samples(0))[:, 1].mean() for r in (routers[0], routers[2]))
    assert long < 0.5 * short


def test_fitting_stops_where_nothing_is_gained():
    """The zero weights reconstruct one half exactly: 110 steps after the first epoch end it."""
    weights = [torch.zeros(shape, requires_grad=True) for shape in ((HIDDEN, 5), (HIDDEN,), (5, HIDDEN), (5,))]
    assert _train(torch.full((8, 5), 0.5), weights, 1000, torch.Generator()) == 111


def test_companions_are_chosen_by_votes(router):
    """Task 3's samples are task 1's for a part, and vote for it; too small a part is none."""
    other = noise(60)
    other = Features(*(part[router.select(other) == -1] for part in other))  # below no threshold: no votes
    assert len(other.text) > 20
    own = router.companion.clone()
    try:
        assert router.choose_companion(3, joined(samples(1, 20), samples(2, 60), other)) == 2
        assert router.choose_companion(3, joined(samples(1, 60), other)) == 1
        assert router.choose_companion(3, samples(1, 60), least_share=1.01) == -1
        assert router.choose_companion(3, other) == -1
        assert router.choose_companion(1, samples(1)) < 1, "the task itself has no vote"
        assert router.choose_companion(0, samples(1)) == -1, "nor have later tasks"
    finally:
        router.companion.copy_(own)


def test_experts_are_a_task_and_its_companion(router):
    """Whatever the batch that a sample is in."""
    features = joined(samples(1, 30), samples(2, 20), samples(0, 5), noise(9))
    tasks = router.select(features)
    own = router.companion.clone()
    try:
        router.companion[2] = 0
        chosen = router.choose(features)
        found = chosen["experts"]
        assert torch.equal(chosen["task"], tasks)
        assert found[:, 0].tolist() == tasks.tolist() and (tasks == 2).any() and (tasks == -1).any()
        assert found[:, 1].tolist() == [0 if task == 2 else -1 for task in tasks.tolist()]
        alone = [router.experts(Features(*(part[i : i + 1] for part in features)))[0] for i in range(len(tasks))]
        assert torch.equal(torch.stack(alone), found)
    finally:
        router.companion.copy_(own)


def test_without_fitted_tasks(router):
    assert router.is_ready
    empty = AutoencoderRouter(T, IMAGE, TEXT)
    assert not empty.is_ready and (empty.experts(samples(0)) == -1).all()


def test_vote_shares():
    assert vote_shares(torch.tensor([2, -1, 2, 0, 1, 2, 1, 0])) == [(2, 3 / 7), (0, 2 / 7), (1, 2 / 7)]
    assert vote_shares(torch.tensor([-1, -1])) == []


def test_joint_features(router):
    """Image and question have the same weight, whatever their norms; a sample without an image has a question only."""
    image, text = 50 * torch.rand(3, IMAGE), torch.rand(3, TEXT)
    image[2] = 0
    found = router.joint(Features(image, text))
    assert found.shape == (3, IMAGE + TEXT)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(found[:2, :IMAGE].norm(dim=1), torch.full((2,), 0.5**0.5))
    torch.testing.assert_close(found[2, IMAGE:], text[2] / text[2].norm())
    assert torch.equal(router.joint(Features(None, text[2:])), found[2:])
    torch.testing.assert_close(router.joint(Features(image[:1], None))[0, :IMAGE], image[0] / image[0].norm())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda r: r.select(Features(None, torch.zeros(2, 9))),
            r"text features must have shape \(2, 10\), got \(2, 9\)",
        ),
        (lambda r: r.select(Features(torch.zeros(3, IMAGE), torch.zeros(2, TEXT))), r"must have shape \(3, 10\)"),
        (lambda r: r.select(Features(torch.full((1, IMAGE), torch.nan), None)), "image features must be finite"),
        (lambda r: r.select(Features(None, None)), "image or text features must be given, got neither"),
        (lambda r: r.fit(T, samples(0)), "task must be one of the router's, 0 to 3, got 4"),
        (lambda r: r.fit(0, samples(0), quantile=0), "quantile must be above 0 and at most 1, got 0"),
        (lambda r: r.fit(0, samples(0, 0)), "features must be those of a sample or more, got none"),
        (lambda r: AutoencoderRouter(0, IMAGE, TEXT), "num_tasks must be"),
    ],
)
def test_bad_input(router, call, message: str):
    with pytest.raises(ValueError, match=message):
        call(router)
