"""Eproj in the trainer: a stage trains its task's projector and keys, and leaves all else as it was."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from peft import AutoPeftModel
from safetensors.torch import load_file
from transformers import AutoTokenizer

from small_llava import small_llava
from smolora.cli import main
from smolora.data.images import ImageTransform
from smolora.data.prompts import PromptEncoder
from smolora.instructions.encoder import InstructionEncoder
from smolora.methods.selector import Features, TaskSelector
from smolora.train.methods import Method
from smolora.train.run import TrainingRun

STAGES = ("stage-1-ImageNet", "stage-2-Flickr30k")


def started(recipe):
    method = Method(recipe)
    model = method.adapter.start(small_llava().requires_grad_(False), None)
    return method, model


def projectors(folder) -> dict[int, dict[str, torch.Tensor]]:
    """The tensors of each task's projector in an adapter's folder."""
    found: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in load_file(folder / "adapter/adapter_model.safetensors").items():
        if ".projectors." in name:
            task, _, rest = name.partition(".projectors.")[2].partition(".")
            found.setdefault(int(task), {})[rest] = tensor
    return found


def equal(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_stage_trains_its_tasks_projector_alone(short):
    method, model = started(short("method=eproj"))
    for number, stage in enumerate(method.course.stages()):
        method.freeze(model, stage)
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        assert len(trained) == 4 and all(f".projectors.{number}.linear_" in name for name in trained)


def test_runs_and_answers_outside_the_trainer(short, tmp_path):
    """The second stage changes its own projector; the first task is answered as before; and PEFT's model answers
    without a task id as the trainer did."""
    options = ("training.batch_size=4", "training.per_device_batch_size=4", "evaluation.max_new_tokens=4")
    results = TrainingRun(short("method=eproj", *options))()
    assert results["task_source"] == "selector" and results["config"]["baseline"] == {}
    assert results["selected"][-1] == {"ImageNet": [4, 0, 0], "Flickr30k": [0, 4, 0]}
    first, second = (projectors(tmp_path / "run" / stage) for stage in STAGES)
    base = dict(small_llava().model.multi_modal_projector.state_dict())
    assert len(first) == len(second) == 2
    assert equal(first[0], second[0]) and not equal(first[0], base)
    assert equal(first[1], base) and not equal(second[1], base)
    files = [tmp_path / "run" / stage / "answers/ImageNet.jsonl" for stage in STAGES]
    answers = [[json.loads(line)["text"] for line in file.read_text().splitlines()] for file in files]
    assert answers[0] == answers[1]
    folder = tmp_path / "run" / STAGES[1] / "adapter"
    model = AutoPeftModel.from_pretrained(folder).eval()
    recipe = short("method=eproj")
    tokenizer = AutoTokenizer.from_pretrained(recipe.model.path)
    encoder = PromptEncoder.for_model(tokenizer, model.config)
    transform, sentences = ImageTransform.from_pretrained(recipe.model.path), InstructionEncoder()
    for number, task in enumerate(recipe.tasks):
        file = tmp_path / "run" / STAGES[1] / f"answers/{task.name}.jsonl"
        written = [json.loads(line)["text"] for line in file.read_text().splitlines()]
        for record, expected in zip(json.loads(recipe.test_file(task).read_text()), written, strict=True):
            ids = torch.tensor([encoder.expand(encoder.prompt(record["text"], True))])
            out = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                pixel_values=transform(recipe.images(task) / record["image"])[None],
                instruction_embeds=sentences.encode([record["text"]]),
                max_new_tokens=4,
                do_sample=False,
            )
            assert model.base_model.last_tasks().tolist() == [number]
            assert tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip() == expected


def keyed(task: int, image: torch.Tensor, text: torch.Tensor):
    """A model of two tasks that has these features in each of its batches, and one without an image."""

    class Model(torch.nn.Module):
        own = TaskSelector(2, 3, 5, keys="trained")

        def selector(self):
            return self.own

        def sample_features(self, task_ids, rows):
            return Features(None if rows is None else image[rows], text[: len(task_ids)])

    tasks = torch.full((4,), task)
    batches = [{"task_ids": tasks, "rows": torch.arange(4)}, {"task_ids": tasks, "rows": None}]
    return Model(), batches


def keys_of(model) -> list[torch.Tensor]:
    image, text = model.own.keys()
    return [image.detach(), text.detach()]


def test_trained_keys_come_to_the_closed_form(short):
    """The normalised mean of normalised features; the other task's keys keep their values."""
    torch.manual_seed(0)
    image, text = torch.randn(4, 3) + 2, torch.randn(4, 5) + 2
    model, batches = keyed(1, image, text)
    before = keys_of(model)
    recipe = short("method=eproj", "methods.eproj.keys=trained", "methods.eproj.key_steps=600")
    adapter = Method(recipe).adapter
    stage = SimpleNamespace(train=recipe.tasks[1:2])
    work = SimpleNamespace(
        batches=lambda: batches, goes_on=False, stage=stage, process=SimpleNamespace(num_processes=1)
    )
    adapter.before_stage(model, work)
    closed = TaskSelector(2, 3, 5)
    closed.add(1, image, text)
    closed.add(1, None, text)
    for found, expected, old in zip(keys_of(model), closed.keys(), before, strict=True):
        assert float(found[1] @ expected[1]) > 0.999 > float(old[1] @ expected[1])
        assert torch.equal(found[0], old[0])
    learned = keys_of(model)
    adapter.before_stage(model, SimpleNamespace(goes_on=True, process=SimpleNamespace(num_processes=1)))
    assert all(torch.equal(one, other) for one, other in zip(learned, keys_of(model), strict=True))
    term = adapter.loss_term(model, batches[0], None)
    cosines = [torch.cosine_similarity(f, k[1].float(), -1) for f, k in zip((image, text), learned, strict=True)]
    assert float(term) == pytest.approx(0.1 * float(sum(1 - c for c in cosines).mean()), rel=1e-4)
    several = SimpleNamespace(process=SimpleNamespace(num_processes=2))
    with pytest.raises(
        ValueError, match=r"methods\.eproj\.keys must be 'closed' with several processes, got 'trained'"
    ):
        adapter.before_stage(model, several)


def test_trained_keys_choose_in_a_run(short):
    results = TrainingRun(short("method=eproj", "methods.eproj={keys: trained, key_steps: 300}"))()
    assert results["selected"][-1] == {"ImageNet": [4, 0, 0], "Flickr30k": [0, 4, 0]}


def test_the_plan_counts_all_projectors(world, capsys):
    assert main(["train", str(world), "--dry-run", "--json", "--method", "eproj", "downstream.zero-shot=[]"]) == 0
    memory = json.loads(capsys.readouterr().out)["memory"]
    size = sum(p.numel() for p in small_llava().model.multi_modal_projector.parameters())
    assert memory["trainable_parameters"] == size
    assert memory["method_gib"] * 2**30 == 4 * 2 * size  # of the other upstream task and the few-shot one


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.full_projector=true", r"training\.full_projector must be false for eproj"),
        (
            "methods.eproj={task: oracle, keys: trained}",
            r"methods\.eproj\.keys must be 'closed' where task is 'oracle'",
        ),
        ("methods.eproj.key_steps=-1", r"methods\.eproj\.key_steps must be"),
        ("methods.eproj.pull=true", r"methods\.eproj\.pull must be"),
        ("methods.eproj.keys=learned", r"methods\.eproj\.keys must be"),
        ("methods.eproj.key=closed", r"methods\.eproj\.key"),
        ("adapter.target_modules=.*q_proj", r"methods\.eproj\.target_modules must be given where adapter\.target"),
        (
            "method={adapter: eproj, schedule: [replay]}",
            r"must not have 'replay' for the adapter 'eproj': a stage trains",
        ),
        ("method={adapter: eproj, schedule: [ewc]}", r"must not have 'ewc' for the adapter 'eproj': a stage trains"),
        ("method={adapter: eproj, schedule: [joint]}", r"must be 'sequential' for the .*'eproj', .*got 'joint'"),
        ("training.arguments.fsdp=true", r"training\.arguments\.fsdp must be left out for the adapter 'eproj'"),
    ],
)
def test_what_is_refused(short, override, message):
    with pytest.raises(ValueError, match=message):
        Method(short("method=eproj", "downstream={}", override))
