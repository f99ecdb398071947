"""Computed routers in a whole model, with PEFT alone."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn import functional

import smolora
from smolora.tuner.context import CONTEXT
from smolora.tuner.features import read_router_features
from support.tiny_llava import INSTRUCTION_DIM, batch, embeddings, tiny_llama, tiny_llava

GREEDY = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
KINDS = {"vu_router_kind": "ridge", "if_router_kind": "prototype"}


def adapted(base: nn.Module | None = None, **options) -> PeftModel:
    defaults = dict(r=4, lora_alpha=8, lora_dropout=0.0, num_vu_experts=1, num_if_experts=1, experts="grow")
    defaults |= dict(instruction_dim=INSTRUCTION_DIM, importance="expert", task_type="CAUSAL_LM", **KINDS)
    config = smolora.SMoLoRAConfig(**{**defaults, **options})
    torch.manual_seed(0)
    return get_peft_model(tiny_llava() if base is None else base, config)


def questions(task: int, lengths=(5, 9, 7)) -> dict[str, Tensor]:
    """A batch of a task, with pictures and an instruction of its own."""
    inputs, draw = batch(lengths), torch.Generator().manual_seed(task)
    shape = inputs["pixel_values"].shape
    picture = 2 * torch.randn(shape[1:], generator=draw)
    pixels = picture + 0.3 * torch.randn(shape, generator=draw)
    text = embeddings(8, seed=7)[task].expand(len(lengths), -1).clone()
    return {**inputs, "pixel_values": pixels, "instruction_embeds": text}


def labelled(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    labels = inputs["input_ids"].clone()
    labels[:, :-2] = -100
    return {**inputs, "labels": labels}


def train(model: nn.Module, task: int, steps: int = 2) -> None:
    """Train on a task as a user would, with weight decay."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2, weight_decay=0.1)
    inputs = labelled(questions(task))
    model.train()
    for _ in range(steps):
        model(**inputs, task_ids=torch.full((3,), task)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def logits(model: nn.Module, task: int, **given) -> Tensor:
    with torch.no_grad():
        return model(**questions(task), **given).logits


def stream(tasks=range(3), **options) -> PeftModel:
    model = adapted(**options)
    for task in tasks:
        smolora.fit_routers(model, [questions(task)], task)
        train(model, task)
    return model


@pytest.mark.parametrize("features", ["vision", "vision+instruction", "hidden", "layer"])
def test_a_stream_is_answered_without_task_ids(features: str):
    """The experts of a task answer its questions as if the task had been given, and no later task changes a bit."""
    model = adapted(router_features=features)
    answers = []
    for task in range(3):
        assert smolora.fit_routers(model, [questions(task)], task) == (task, task)
        plain = logits(model, task)
        train(model, task)
        answers.append(logits(model, task))
        assert (answers[task] - plain).abs().max() > 1e-3
    config = model.peft_config["default"]
    assert (config.num_vu_experts, config.num_if_experts, config.num_tasks) == (3, 3, 3)
    for task in range(3):
        assert torch.equal(logits(model, task), answers[task])
        assert model.last_tasks().tolist() == [task] * 3
        assert torch.equal(logits(model, task, task_ids=torch.full((3,), task)), answers[task])


def test_saved_and_continued_later(tmp_path):
    """Also with tasks that share an instruction, and with more samples of a known task."""
    model = stream((0, 1))
    model.save_pretrained(tmp_path)
    later = PeftModel.from_pretrained(tiny_llava(), tmp_path, is_trainable=True)
    answers = [logits(model, task) for task in range(2)]
    assert all(torch.equal(logits(later, task), answers[task]) for task in range(2))
    alike = {**questions(2), "instruction_embeds": questions(1)["instruction_embeds"]}
    assert smolora.fit_routers(later, [alike], 2) == (2, 1)
    experts = next(m for m in later.modules() if isinstance(m, smolora.MIXTURES["smolora"].experts))
    assert experts.vu_frozen.tolist() == [True, True, False] and experts.if_frozen.tolist() == [True, True]
    train(later, 2)
    assert all(torch.equal(logits(later, task), answers[task]) for task in range(2))
    assert smolora.fit_routers(later, [questions(0, (6, 4, 8))], 0) == (0, 0)
    assert all(torch.equal(logits(later, task), answers[task]) for task in range(2))
    later.save_pretrained(tmp_path / "again")
    again = PeftModel.from_pretrained(tiny_llava(), tmp_path / "again")
    assert torch.equal(logits(again, 2), logits(later, 2))


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"use_cache": False}], ids=["cache", "beams", "no cache"])
@pytest.mark.parametrize("features", ["vision+instruction", "layer"])
def test_generate_keeps_the_choice(features: str, options: dict):
    """Batches of several tasks, with padding, answer as their questions do one by one with their task given."""
    model = stream(router_features=features)
    one = [questions(task, (9,)) for task in range(3)]
    together = {name: torch.cat([each[name] for each in one]) for name in one[0]}
    answers = model.generate(**together, **GREEDY, **options)
    assert model.last_tasks()[:: options.get("num_beams", 1)].tolist() == [0, 1, 2]
    for task in range(3):
        given = model.generate(**one[task], task_ids=torch.tensor([task]), **GREEDY, **options)
        assert torch.equal(answers[task], given[0])


def test_features_are_of_the_frozen_base():
    """They are the base's own whatever the adapter has learned, over the prompt's tokens alone."""
    model, plain, inputs = stream(), tiny_llava(), labelled(questions(1))
    context = model.base_model.model.__dict__[CONTEXT]
    reads = {"hidden", "layers"}
    given = {name: value for name, value in inputs.items() if name != "instruction_embeds"}
    found = read_router_features(context, "default", given, None, 3, reads=reads)
    prompt = (inputs["labels"] == -100) & inputs["attention_mask"].bool()
    seen = {}
    layer = plain.model.language_model.layers[1].mlp.down_proj
    layer.register_forward_pre_hook(lambda module, args: seen.update(x=args[0]))
    with torch.no_grad():
        own = {name: value for name, value in given.items() if name != "labels"}
        hidden = plain.model(**own).last_hidden_state
    weights = prompt[..., None] / prompt.sum(1)[:, None, None]
    torch.testing.assert_close(found.hidden, (hidden * weights).sum(1))
    (place,) = (i for i, each in enumerate(context.layers) if each.endswith("layers.1.mlp.down_proj"))
    torch.testing.assert_close(found.layers[place], (seen["x"] * weights).sum(1))


def test_a_text_model_routes_by_hidden_states():
    model = adapted(tiny_llama(), router_features="hidden")
    for task in range(2):
        inputs = {"input_ids": torch.randint(4, 60, (3, 8), generator=torch.Generator().manual_seed(task))}
        inputs["instruction_embeds"] = embeddings(8, seed=7)[task]
        assert smolora.fit_routers(model, [inputs], task) == (task, task)
        with torch.no_grad():
            model.eval()(**inputs)
        assert model.last_tasks().tolist() == [task] * 3
    with pytest.raises(ValueError, match="router_features must be 'hidden' or 'layer' for a LlamaForCausalLM"):
        adapted(tiny_llama(), router_features="vision")


@pytest.mark.parametrize("reload", [False, True])
def test_the_report_shows_tasks_and_experts(reload: bool, tmp_path):
    model = stream()
    if reload:
        model.save_pretrained(tmp_path)
        model = PeftModel.from_pretrained(tiny_llava(), tmp_path)
    logits(model, 2)
    for layer in smolora.routing_report(model).values():
        assert layer["vu_experts"].tolist() == layer["if_experts"].tolist() == [2, 2, 2]
        assert layer["tasks"].tolist() == [2, 2, 2] and layer["task_experts"].tolist() == [[0, 0], [1, 1], [2, 2]]
        assert (layer["margins"] > 0).all() and layer["margins"].shape == (3, 2)


def test_fitting_refuses():
    """Before anything changes."""
    model = adapted()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"task_ids must be of tasks that smolora.fit_routers has seen, and it has"):
        logits(model, 0, task_ids=torch.tensor([0, 0, 0]))
    with pytest.raises(ValueError, match="task_ids must be given"):
        logits(model, 0)
    with pytest.raises(ValueError, match="task must be an integer of at least 0, got True"):
        smolora.fit_routers(model, [questions(0)], True)
    with pytest.raises(ValueError, match="batches must have a sample of the task or more, got none"):
        smolora.fit_routers(model, [], 0)
    with pytest.raises(ValueError, match="instruction_embeds must be given, by which the adapter's computed routers"):
        smolora.fit_routers(model, [{**questions(0), "instruction_embeds": None}], 0)
    broken = questions(0)
    broken["instruction_embeds"][1] = torch.nan
    with pytest.raises(ValueError, match="must be finite, got NaN"):
        smolora.fit_routers(model, [questions(0), broken], 0)
    with pytest.raises(TypeError, match="model must be a PEFT model with a SMoLoRA adapter, got Linear"):
        smolora.fit_routers(nn.Linear(2, 2), [], 0)
    random = adapted(experts="fixed", vu_router_kind="random", if_router_kind="random")
    with pytest.raises(ValueError, match="adapter_name must name a SMoLoRA adapter with vu_router_kind or"):
        smolora.fit_routers(random, [questions(0)], 0)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert model.peft_config["default"].num_tasks == 0


def test_sequences_without_an_image():
    """A sample without a picture is found by its instruction."""
    model = stream(router_features="vision+instruction")
    inputs = questions(1)
    mixed = {**batch((5, 9, 7), images=(1, 0, 1)), "instruction_embeds": inputs["instruction_embeds"]}
    mixed["pixel_values"] = inputs["pixel_values"][:2]
    with torch.no_grad():
        model(**mixed)
    assert model.last_tasks().tolist() == [1, 1, 1]
    found = functional.normalize(model.sample_features(**mixed).image)
    assert found[1].abs().max() == 0
