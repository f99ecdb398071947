"""The keys of tasks, and the choice by them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import smolora
from smolora.methods.selector import Features

IMAGE, TEXT, TASKS = 6, 5, 3


def samples(task: int, n: int = 7, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Features (n, IMAGE) and (n, TEXT) of a task, of any length, around a direction of its own."""
    generator = torch.Generator().manual_seed(100 * seed + task)
    found = []
    for dim in (IMAGE, TEXT):
        centre = functional.one_hot(torch.tensor(task), dim) * 3.0
        features = centre + torch.randn(n, dim, generator=generator)
        found.append(features * torch.rand(n, 1, generator=generator).add(0.1))
    return found[0], found[1]


def filled(**options) -> smolora.TaskSelector:
    selector = smolora.TaskSelector(TASKS, IMAGE, TEXT, **options)
    for task in range(TASKS):
        selector.add(task, *samples(task))
    return selector


def nearest(image: Tensor | None, text: Tensor | None, tasks=range(TASKS)) -> list[int]:
    """The choice as the method defines it, sample by sample in float64."""
    keys = []
    for task in tasks:
        means = [functional.normalize(f.double(), dim=1).mean(0) for f in samples(task)]
        keys.append([mean / mean.norm() for mean in means])
    chosen = []
    for i in range(len(image if image is not None else text)):
        scores = []
        for key in keys:
            score = 0.0
            for features, direction in ((image, key[0]), (text, key[1])):
                if features is not None and features[i].any():
                    score += float(functional.cosine_similarity(features[i].double(), direction, dim=0))
            scores.append(score)
        chosen.append(list(tasks)[scores.index(max(scores))])
    return chosen


def test_keys_are_normalised_means_of_normalised_features():
    selector = filled()
    for part, found in enumerate(selector.keys()):
        for task in range(TASKS):
            mean = functional.normalize(samples(task)[part].double()).mean(0)
            torch.testing.assert_close(found[task], mean / mean.norm(), rtol=0, atol=1e-11)


def test_the_nearest_keys_are_chosen():
    selector = filled()
    image, text = (torch.cat(parts) for parts in zip(*(samples(t, 20, seed=1) for t in range(TASKS)), strict=True))
    chosen = selector.select(image, text)
    assert chosen.dtype == torch.int64 and chosen.tolist() == nearest(image, text)
    assert selector.select(None, text).tolist() == nearest(None, text)
    assert selector.select(image).tolist() == nearest(image, None)
    assert len(set(chosen.tolist())) == TASKS and chosen.tolist() != nearest(None, text) != nearest(image, None)


def test_a_sample_without_an_image_is_chosen_by_its_text():
    """Rows of zeros have no image, and samples without one do not change the image key."""
    selector = filled()
    image, text = samples(1, 20, seed=1)
    some = image.clone()
    some[::2] = 0
    chosen = selector.select(some, text).tolist()
    assert chosen[::2] == nearest(None, text)[::2] and chosen[1::2] == nearest(image, text)[1::2]
    more = filled()
    more.add(1, torch.zeros(4, IMAGE), samples(1, 4, seed=3)[1])
    assert torch.equal(more.keys()[0], selector.keys()[0]) and not torch.equal(more.keys()[1], selector.keys()[1])


def test_a_task_of_text_alone():
    selector = smolora.TaskSelector(TASKS, IMAGE, TEXT)
    selector.add(0, *samples(0))
    selector.add(2, None, samples(2)[1])
    assert not selector.keys()[0][2].any()
    assert selector.select(None, samples(2)[1]).tolist() == [2] * 7
    assert 1 not in selector.select(*samples(1, seed=2)).tolist()  # it has no keys


def test_neither_order_nor_batches_change_a_bit():
    image, text = samples(0, 64)
    whole, parts = smolora.TaskSelector(1, IMAGE, TEXT), smolora.TaskSelector(1, IMAGE, TEXT)
    whole.add(0, image, text)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    for rows in order.split(5):
        parts.add(0, image[rows], text[rows])
    processes = smolora.TaskSelector(1, IMAGE, TEXT)
    one, other = processes.sums(image[::2], text[::2]), processes.sums(image[1::2], text[1::2])
    processes.add_sums(0, one[0] + other[0], one[1] + other[1])
    for selector in (parts, processes):
        for mine, theirs in zip(selector.keys(), whole.keys(), strict=True):
            assert torch.equal(mine, theirs)


def test_trained_keys_agree_with_the_closed_form():
    """The alignment loss has its minimum there, and the tasks that it does not see keep their keys."""
    torch.manual_seed(0)
    trained, closed = smolora.TaskSelector(TASKS, IMAGE, TEXT, keys="trained"), filled()
    image_keys, text_keys = trained.keys()
    before = image_keys.clone(), text_keys.clone()
    optimizer = torch.optim.AdamW(trained.parameters(), lr=0.02, weight_decay=0.1)
    for step in range(600):
        task = 2 * (step % 2)
        image, text = samples(task)
        optimizer.zero_grad()
        loss = trained(torch.full((7,), task), image, text)
        loss.backward()
        optimizer.step()
    for mine, theirs, start in zip(trained.keys(), closed.keys(), before, strict=True):
        assert (functional.cosine_similarity(mine, theirs)[[0, 2]] > 1 - 1e-5).all()
        assert torch.equal(mine[1], start[1])
    expected = sum(
        float((1 - functional.cosine_similarity(f.double(), key[2][None])).sum())
        for f, key in zip((image, text), closed.keys(), strict=True)
    )
    assert loss.item() == pytest.approx(expected, abs=1e-3)
    assert trained.learned.tolist() == [True, False, True]
    image, text = samples(0, 20, seed=1)
    assert trained.select(image, text).tolist() == nearest(image, text, (0, 2))


def test_the_alignment_loss_leaves_out_missing_images():
    trained = smolora.TaskSelector(1, IMAGE, TEXT, keys="trained")
    image, text = samples(0, 2)
    image[1] = 0
    task = torch.zeros(2, dtype=torch.long)
    parts = trained(task[:1], image[:1], text[:1]) + trained(task[1:], None, text[1:])
    torch.testing.assert_close(trained(task, image, text), parts)


def test_sizes_may_be_left_open():
    selector, fixed = smolora.TaskSelector(), filled()
    for task in (2, 0, 1):
        selector.add(task, *samples(task))
    assert all(map(torch.equal, selector.keys(), fixed.keys()))
    other = smolora.TaskSelector()
    other.load_state_dict(selector.state_dict())
    assert torch.equal(other.select(*samples(1, seed=4)), fixed.select(*samples(1, seed=4)))


@pytest.mark.parametrize("keys", ["closed", "trained"])
def test_state_dict(keys: str):
    """Keys survive a save, and a cast of the model leaves those in closed form as they are."""
    selector = filled() if keys == "closed" else smolora.TaskSelector(TASKS, IMAGE, TEXT, keys="trained")
    if keys == "trained":
        selector(torch.tensor([1]), *samples(1, 1))
    else:
        selector.half()
    other = smolora.TaskSelector(TASKS, IMAGE, TEXT, keys=keys)
    other.load_state_dict(selector.state_dict())
    for mine, theirs, whole in zip(selector.keys(), other.keys(), filled().keys(), strict=True):
        assert torch.equal(mine, theirs) and (keys == "trained" or torch.equal(mine, whole))
    assert torch.equal(other.learned, selector.learned)


def call(selector: smolora.TaskSelector, *arguments) -> Tensor:
    return selector.select(*arguments)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ((None, None), ValueError, "image_features or text_features must be given, got neither"),
        ((torch.zeros(2, IMAGE), torch.zeros(2, TEXT)), ValueError, "must be given of every sample, got only zeros"),
        ((torch.ones(2, 4), None), ValueError, r"image_features must have shape \(n, 6\).*got \(2, 4\)"),
        ((torch.ones(2, IMAGE), torch.ones(3, TEXT)), ValueError, r"must have shape \(n, 6\), a row for each sample"),
        ((None, torch.ones(TEXT)), ValueError, r"text_features must have shape \(n, 5\).*got \(5,\)"),
        ((None, torch.full((1, TEXT), torch.nan)), ValueError, "text_features must be finite"),
        ((None, torch.ones(1, TEXT, dtype=torch.int64)), TypeError, "text_features must be a floating point tensor"),
        (("cat", None), TypeError, "image_features must be a floating point tensor, got str"),
    ],
)
def test_bad_features(arguments: tuple, kind: type, message: str):
    selector = filled()
    with pytest.raises(kind, match=message):
        selector.select(*arguments)
    with pytest.raises((kind, TypeError, ValueError)):
        if "zeros" in message:
            raise kind  # such samples add nothing
        selector.add(0, *arguments)


def test_bad_input():
    selector = smolora.TaskSelector(TASKS, IMAGE, TEXT)
    with pytest.raises(ValueError, match=r"select\(\) needs the keys of a task"):
        selector.select(*samples(0))
    assert not selector.is_ready
    for task in (3, -1, True):
        with pytest.raises(ValueError, match=r"task must (name one of the selector's, 0 to 2|be an integer)"):
            selector.add(task, *samples(0))
    with pytest.raises(ValueError, match="num_tasks must be a positive integer, got 0"):
        smolora.TaskSelector(0)
    with pytest.raises(ValueError, match="keys must be one of 'closed', 'trained', got 'learned'"):
        smolora.TaskSelector(2, 3, 4, keys="learned")
    with pytest.raises(ValueError, match="image_dim must be an integer of at least 0, got None"):
        smolora.TaskSelector(2, None, 4, keys="trained")
    with pytest.raises(ValueError, match=r"keys must be 'closed' for add\(\)"):
        smolora.TaskSelector(2, IMAGE, TEXT, keys="trained").add(0, *samples(0))
    with pytest.raises(ValueError, match="keys must be 'trained' for an alignment loss"):
        selector(torch.tensor([0]), *samples(0, 1))


def test_tasks_that_were_not_learned_are_refused():
    selector = smolora.TaskSelector(TASKS, IMAGE, TEXT)
    selector.check({"task": torch.tensor([2])})  # nothing tells
    selector.add(0, *samples(0))
    selector.check({"task": torch.tensor([0, 0])})
    with pytest.raises(
        ValueError, match=r"task_ids must be of tasks that the adapter has learned, \[0\], got \[0, 2\]"
    ):
        selector.check({"task": torch.tensor([0, 2])})


def test_choose():
    image, text = samples(1)
    assert torch.equal(filled().choose(Features(image, text))["task"], filled().select(image, text))
