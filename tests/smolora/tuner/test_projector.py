"""Eproj in whole models: projectors by image, found by keys, saved and read back."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

import smolora
from support.tiny_llava import INSTRUCTION_DIM, batch, embeddings, tiny_llava

TASKS = 4
GREEDY = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def config(**options) -> smolora.EprojConfig:
    return smolora.EprojConfig(
        **{"num_tasks": TASKS, "instruction_dim": INSTRUCTION_DIM, "task_type": "CAUSAL_LM", **options}
    )


def questions(task: int, n: int = 1) -> Tensor:
    """Embeddings of a task's questions."""
    return embeddings(TASKS, seed=7)[task] + 0.1 * embeddings(n, seed=task)


def adapted(learned=(0, 1, 2)) -> nn.Module:
    """Projectors with values of their own, and keys of text for the learned tasks."""
    model = get_peft_model(tiny_llava(), config()).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "eproj_experts" in name:
                parameter.add_(torch.randn_like(parameter))
    for task in learned:
        model.selector().add(task, None, questions(task, 5))
    return model


def mixed() -> tuple[dict, Tensor, Tensor]:
    """Four samples with 1, 2, 0 and 1 images, the embeddings of their questions, and their tasks."""
    tasks = torch.tensor([2, 0, 1, 1])
    return batch((5, 9, 7, 6), images=(1, 2, 0, 1)), torch.cat([questions(int(t)) for t in tasks]), tasks


def logits(model: nn.Module, inputs: dict, **given) -> Tensor:
    with torch.no_grad():
        return model(**inputs, **given).logits


def test_targets_and_parameters():
    model = get_peft_model(tiny_llava(), config())
    assert model.targeted_module_names == ["model.multi_modal_projector"]
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == TASKS * 4 and all(".eproj_experts.default.projectors." in name for name in trained)


def test_a_new_adapter_changes_nothing_and_a_filled_one_does():
    inputs, _, tasks = mixed()
    expected = logits(tiny_llava(), inputs)
    new = get_peft_model(tiny_llava(), config()).eval()
    assert torch.equal(logits(new, inputs, task_ids=torch.ones_like(tasks)), expected)
    torch.testing.assert_close(logits(new, inputs, task_ids=tasks), expected, rtol=1e-4, atol=1e-4)
    model = adapted()
    changed = (logits(model, inputs, task_ids=tasks) - expected).abs().amax((1, 2))
    assert (changed > 0.01).tolist() == [True, True, False, True]  # the third has no image
    with model.disable_adapter():
        assert torch.equal(logits(model, inputs), expected)


def test_a_batch_answers_as_its_samples_do_one_by_one():
    """Found by keys or given; each image goes through the projector of its own sample's task."""
    model, (inputs, text, tasks) = adapted(), mixed()
    written = model.generate(**inputs, instruction_embeds=text, **GREEDY)
    assert model.last_tasks().tolist() == tasks.tolist()
    assert torch.equal(written, model.generate(**inputs, task_ids=tasks, **GREEDY))
    found = logits(model, inputs, instruction_embeds=text)
    first = [0, 1, 3, 3]  # the place of a sample's images
    for i, count in enumerate((1, 2, 0, 1)):
        own = {"input_ids": inputs["input_ids"][i : i + 1], "attention_mask": inputs["attention_mask"][i : i + 1]}
        if count:
            own["pixel_values"] = inputs["pixel_values"][first[i] : first[i] + count]
        alone = logits(model, own, instruction_embeds=text[i : i + 1])[0]
        torch.testing.assert_close(alone, found[i], rtol=1e-4, atol=1e-4)
        assert torch.equal(model.generate(**own, instruction_embeds=text[i : i + 1], **GREEDY)[0], written[i])
    other = logits(model, inputs, task_ids=tasks.roll(1))
    assert (other - found).abs().amax((1, 2))[0] > 0.01


def test_a_slot_that_was_not_trained_is_never_chosen():
    """Even by a question that is opposite to all keys, where the zeros of an empty slot would be nearer."""
    model, (inputs, _, _) = adapted(learned=[2]), mixed()
    opposite = -questions(2).expand(4, -1)
    image = torch.zeros(4, model.selector().image_sums.shape[1])
    assert model.selector().select(image, opposite).tolist() == [2] * 4
    model.generate(**inputs, instruction_embeds=opposite, **GREEDY)
    assert model.last_tasks().tolist() == [2] * 4
    with pytest.raises(ValueError, match=r"task_ids must be of tasks that the adapter has learned, \[2\], got"):
        model.generate(**inputs, task_ids=torch.tensor([0, 1, 2, 2]), **GREEDY)


def test_save_and_load(tmp_path):
    model, (inputs, text, _) = adapted(), mixed()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert len([name for name in tensors if ".projectors." in name]) == TASKS * 4
    loaded = PeftModel.from_pretrained(tiny_llava(), tmp_path).eval()
    expected = logits(model, inputs, instruction_embeds=text)
    assert torch.equal(logits(loaded, inputs, instruction_embeds=text), expected)
    assert torch.equal(logits(copy.deepcopy(loaded), inputs, instruction_embeds=text), expected)
    base = loaded.unload()
    assert torch.equal(logits(base, inputs), logits(tiny_llava(), inputs))


def test_a_broken_adapter_is_refused(tmp_path):
    from safetensors.torch import save_file

    adapted().save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    gone = next(name for name in tensors if ".projectors.2." in name)
    save_file({name: t for name, t in tensors.items() if name != gone}, path)
    with pytest.raises(KeyError, match=r"missing.*projectors\.2"):
        PeftModel.from_pretrained(tiny_llava(), tmp_path)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_the_projector_through_the_frozen_model(checkpointing):
    """With checkpointed layers too; the projectors of other tasks get none."""
    model, (inputs, _, _) = adapted().train(), mixed()
    labels = torch.where(inputs["attention_mask"].bool(), inputs["input_ids"], -100)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model(**inputs, labels=labels, task_ids=torch.tensor([1, 1, 1, 1])).loss.backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert len(with_gradient) == 4 and all(".projectors.1." in name for name in with_gradient)


def test_what_cannot_be():
    with pytest.raises(TypeError, match=r"target_modules must name projectors, but .*linear_1: a projector must be"):
        get_peft_model(tiny_llava(), config(target_modules=["linear_1"]))
    model = adapted()
    with pytest.raises(ValueError, match="cannot be merged into the base"):
        model.merge_and_unload()
    model.add_adapter("other", config())
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match=r"one Eproj adapter can be active at a time"):
        model(**batch((5, 9)), task_ids=torch.tensor([0, 1]))
