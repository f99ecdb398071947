"""MoE-CL in the trainer: its parameters, what a stage trains, and whom the selector finds."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from small_llava import small_llava
from smolora.instructions.encoder import InstructionEncoder
from smolora.train.methods import Method
from smolora.train.run import TrainingRun
from smolora.tuner.counts import num_trainable
from support.train_world import OBJECT, SENTENCE


def test_trained_parameters(short):
    """As many as the baselines have on the same layers, besides routers and discriminators."""
    found = {}
    for method in ("moecl", "seqlora"):
        adapter = Method(short(f"method={method}")).adapter
        model = adapter.start(small_llava().requires_grad_(False), None)
        found[method] = num_trainable(model)
    projector = sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and "projector" in n)
    assert found["moecl"] == found["seqlora"] - projector + 2 * (2 * 32 + 2 * 32)


def test_bad_rank(short):
    with pytest.raises(ValueError, match=r"baseline.rank must be even for moecl, .* got 5"):
        Method(short("method=moecl", "baseline.rank=5")).adapter.config(small_llava())


def test_without_a_discriminator(short):
    method = Method(short("method=moecl", "methods.moecl.discriminator_weight=0"))
    assert method.loss_term(torch.nn.Identity(), {}, None) is None


def test_runs(short, tmp_path):
    """A stage moves the shared expert and its task's, and no others. The two tasks' questions differ, so the selector
    is always right, and answers are those of a model that is told; its keys are the closed form."""
    answers = {}
    for task in ("selector", "oracle"):
        options = (f"methods.moecl.task={task}", f"output={tmp_path / task}")
        results = TrainingRun(
            short("method=moecl", "training.batch_size=4", "training.per_device_batch_size=2", *options)
        )()
        assert results["config"]["methods"]["moecl"]["task"] == task
        assert results["task_source"] == {"selector": "selector", "oracle": "given"}[task]
        right = {"ImageNet": [4, 0, 0], "Flickr30k": [0, 4, 0]}
        chosen = [{"ImageNet": right["ImageNet"]}, right]
        assert results["selected"] == (chosen if task == "selector" else None)
        files = (tmp_path / task).glob("*/answers/*.jsonl")
        answers[task] = {path.relative_to(tmp_path / task): path.read_text() for path in files}
    assert len(answers["oracle"]) == 3 and answers["selector"] == answers["oracle"]
    stages = [tmp_path / "selector" / name / "adapter" for name in ("stage-1-ImageNet", "stage-2-Flickr30k")]
    before, after = (load_file(stage / "adapter_model.safetensors") for stage in stages)
    experts = [name for name in before if name[-2:] in ("_A", "_B")]
    assert len(experts) == 12
    for name in experts:
        same = [torch.equal(a, b) for a, b in zip(before[name], after[name], strict=True)]
        assert same == [False, True, False], name
    moved = {name.rpartition(".")[2] for name in before if not torch.equal(before[name], after[name])}
    assert {"router", "discriminator"} <= moved
    selector = PeftModel.from_pretrained(small_llava(), stages[1]).base_model.selector()
    image, text = selector.keys()
    expected = torch.nn.functional.normalize(InstructionEncoder().encode([OBJECT, SENTENCE]).double())
    torch.testing.assert_close(text, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(image.norm(dim=1), torch.ones(2, dtype=torch.float64))
    told = PeftModel.from_pretrained(small_llava(), tmp_path / "oracle/stage-2-Flickr30k/adapter")
    assert selector.learned.all() and not told.base_model.selector().learned.any()
