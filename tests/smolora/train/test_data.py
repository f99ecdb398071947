"""Batches: labels on the answer alone, images, instructions, order."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from smolora.backbones.llava import Llava
from smolora.data.prompts import IGNORED_LABEL, SYSTEM, PromptEncoder
from smolora.train.data import Collator, GlobalBatches, StageSamples, TaskSamples
from smolora.train.run import TrainingRun
from support.train_world import OBJECT, SENTENCE


@pytest.fixture
def loaded(short):
    def load(*overrides):
        run = TrainingRun(short(*overrides))
        run.load_processors()
        return run

    return load


def collate(run, samples, places):
    collator = Collator(run.backbone, run.recipe.training.max_length, run.dtype)
    return collator([samples[place] for place in places])


def test_batch(loaded):
    run = loaded()
    samples = TaskSamples(run.recipe, run.recipe.tasks[1], run.backbone, run.texts["Flickr30k"])
    batch = collate(run, samples, [0, 1, 5])
    tokenizer = run.backbone.tokenizer
    assert {key: tuple(value.shape[:1]) for key, value in batch.items()} == {key: (3,) for key in batch}
    assert batch["pixel_values"].shape == (3, 3, 28, 28) and batch["instruction_embeds"].shape == (3, 384)
    for row, place in enumerate((0, 1, 5)):
        ids, labels = batch["input_ids"][row], batch["labels"][row]
        valid = batch["attention_mask"][row].bool()
        sample = samples.samples[place]
        assert tokenizer.decode(labels[labels != -100]) == f" {sample.answer}</s>"
        assert torch.equal(ids[labels != -100], labels[labels != -100])
        assert (ids == 3).sum() == 4, "an image is as many tokens as it has features"
        text = tokenizer.decode(ids[valid & (ids != 3) & (labels == -100)], skip_special_tokens=True)
        assert text == f"{SYSTEM} USER: \n{sample.text} ASSISTANT:"
        assert not valid[int(valid.sum()) :].any(), "padding is on the right"
    # two samples share an image, the third has another
    assert torch.equal(batch["pixel_values"][0], batch["pixel_values"][1])
    assert not torch.equal(batch["pixel_values"][0], batch["pixel_values"][2])


def test_shared_images_are_read_once(loaded, monkeypatch):
    run = loaded()
    samples = TaskSamples(run.recipe, run.recipe.tasks[1], run.backbone, run.texts["Flickr30k"])
    read = []
    transform = run.backbone.transform
    run.backbone.transform = lambda path: read.append(path) or transform(path)
    collate(run, samples, [0, 1, 5])
    assert len(read) == 2


def test_instructions(loaded):
    run = loaded()
    first, second = run.recipe.tasks
    encode = run.texts[first.name].encoder.encode
    embedded = TaskSamples(run.recipe, first, run.backbone, run.texts[first.name])[0].instruction
    torch.testing.assert_close(embedded, encode(OBJECT))  # both of its lines
    assert torch.equal(run.texts[second.name]([f"x\n{SENTENCE}"])[0], encode(SENTENCE))
    mean = loaded("instructions.embed=task_mean", f"tasks.0.instructions=['{OBJECT!s}', 'Name it.']".replace("\n", " "))
    task = mean.recipe.tasks[0]
    instructions = mean.texts[task.name]
    expected = instructions.encoder.encode(task.instructions).mean(0)
    assert torch.equal(TaskSamples(mean.recipe, task, mean.backbone, instructions)[3].instruction, expected)
    assert torch.equal(instructions(["a", "b"]), expected.expand(2, -1))


def test_a_broken_image_names_its_record(loaded, tmp_path):
    run = loaded()
    samples = TaskSamples(run.recipe, run.recipe.tasks[0], run.backbone, None)
    broken = samples[2]._replace(images=(tmp_path / "none.png",))
    with pytest.raises(ValueError, match=r"train.json: record 2: there is no image"):
        Collator(run.backbone, 2048, torch.float32)([broken])


def test_long_samples_are_cut_at_the_end(loaded):
    whole = loaded()
    full = collate(whole, TaskSamples(whole.recipe, whole.recipe.tasks[1], whole.backbone, None), [0])
    answer = int((full["labels"] != -100).sum())
    kept = full["input_ids"].shape[1] - answer + 2
    run = loaded(f"training.max_length={kept}")
    cut = collate(run, TaskSamples(run.recipe, run.recipe.tasks[1], run.backbone, None), [0])
    assert cut["input_ids"].shape == (1, kept) and torch.equal(cut["input_ids"], full["input_ids"][:, :kept])
    assert int((cut["labels"] != -100).sum()) == 2 < answer
    with pytest.raises(
        ValueError, match=r"record 0: training.max_length 60 cuts off all of its answer, it has \d+ tokens"
    ):
        run = loaded("training.max_length=60")
        TaskSamples(run.recipe, run.recipe.tasks[1], run.backbone, None)
    with pytest.raises(ValueError, match=r"record 0: its image does not fit into training.max_length 20"):
        run = loaded("training.max_length=20")
        TaskSamples(run.recipe, run.recipe.tasks[1], run.backbone, None)[0]


def test_a_text_that_cannot_be_tokenised_names_its_record(loaded, tmp_path):
    """An image token that its tokenizer does not mark as special, and one record that has it."""
    run = loaded()
    tokenizer = run.backbone.tokenizer
    tokenizer.add_tokens(["<picture>"])
    encoder = PromptEncoder(tokenizer, tokenizer.convert_tokens_to_ids("<picture>"), 4)
    backbone = Llava(encoder, run.backbone.transform)
    content = json.loads(run.recipe.train_file(run.recipe.tasks[0]).read_text())
    content[7]["conversations"][1]["value"] = "It is <picture>."
    (tmp_path / "train.json").write_text(json.dumps(content))
    task = dataclasses.replace(run.recipe.tasks[0], train=str(tmp_path / "train.json"))
    with pytest.raises(ValueError, match=r"train.json: record 7: a text must not hold '<picture>'"):
        TaskSamples(run.recipe, task, backbone, None)


def test_order():
    lengths = torch.randint(5, 50, (70,), generator=torch.Generator().manual_seed(0)).tolist()
    order = GlobalBatches(lengths, 16, seed=3)
    first = list(order)
    assert sorted(first) == list(range(70)) and list(order) == first
    steps = [first[start : start + 16] for start in range(0, 70, 16)]
    assert [len(step) for step in steps] == [16, 16, 16, 16, 6]
    for step in steps:
        assert [lengths[index] for index in step] == sorted((lengths[index] for index in step), reverse=True)
    order.set_epoch(1)
    second = list(order)
    assert sorted(second) == list(range(70)) and second != first
    # a step is a random set of samples, whatever their lengths: sorting everything first would give means far apart
    means = [sum(lengths[index] for index in step) / len(step) for step in steps[:4]]
    assert max(means) - min(means) < 12
    assert list(GlobalBatches(lengths, 16, seed=4)) != first


def test_fillers_of_the_last_step():
    """Several devices each need a batch of it; only the last step has any, and they are its shortest sample."""
    lengths = [9, 4, 7, 5, 8, 6]
    plain, filled = GlobalBatches(lengths, 4, seed=0), GlobalBatches(lengths, 4, seed=0, multiple=4)
    order = list(plain)
    assert list(filled) == [*order, ~order[5], ~order[5]] and len(filled) == 8 and len(plain) == 6
    assert lengths[order[5]] == min(lengths[index] for index in order[4:])
    assert list(GlobalBatches(lengths, 2, seed=0, multiple=2)) == list(GlobalBatches(lengths, 2, seed=0))


def test_samples_of_several_tasks(loaded):
    run = loaded()
    parts = [TaskSamples(run.recipe, task, run.backbone, None) for task in run.recipe.tasks]
    parts.append(TaskSamples(run.recipe, run.recipe.tasks[0], run.backbone, None, [7]))
    samples = StageSamples(parts)
    assert len(samples) == len(samples.lengths) == 25
    assert samples[24] == parts[0][7] and samples[12] == parts[1][0]
    filler = samples[~24]
    assert set(filler.labels) == {IGNORED_LABEL} and filler.input_ids == samples[24].input_ids
    assert len(filler.labels) == len(samples[24].labels)
