"""Answers of a model with a `generation_config` of its own, or with several adapters."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch
from accelerate import disk_offload
from peft import get_peft_model

import small_llava
import smolora
from support.answers import BATCHED, info, read

# ---- what the model brings


GREEDY = {
    "repetition_penalty": 1.8,
    "no_repeat_ngram_size": 1,
    "min_new_tokens": 5,
    "suppress_tokens": list(range(4, 300)),
    "bad_words_ids": [[token] for token in range(4, 300)],
    "begin_suppress_tokens": list(range(4, 300)),
    "sequence_bias": [[[5], 50.0]],
    "forced_eos_token_id": 2,
    "exponential_decay_length_penalty": (1, 5.0),
    "guidance_scale": 3.0,
    "max_time": 1e-9,
    "return_dict_in_generate": True,
    "num_return_sequences": 2,
    "num_beams": 3,
    "do_sample": True,
    "temperature": 0.1,
    "max_length": 20,
    "prompt_lookup_num_tokens": 2,
    "eos_token_id": [2, 7, 8],
    "cache_implementation": "static",
    "use_cache": False,
    "renormalize_logits": True,
    "output_scores": True,
    "custom_entry": 1,
}


@pytest.mark.parametrize("name", GREEDY)
def test_the_models_own_generation_config_changes_nothing(generate, model, questions, whole, monkeypatch, name):
    """Greedily, always: `generate` takes what it is not told from there."""
    inner = model.get_base_model()
    for owner in (model, inner):
        monkeypatch.setattr(owner, "generation_config", copy.deepcopy(owner.generation_config), raising=False)
        setattr(owner.generation_config, name, GREEDY[name])
    assert generate(questions).read_bytes() == whole.read_bytes()
    assert getattr(inner.generation_config, name) == GREEDY[name], "it is the model's again"


def test_the_generation_config_is_given_back_after_an_error(generate, model, questions, count_batches):
    before = model.get_base_model().generation_config
    count_batches(limit=1)
    with pytest.raises(RuntimeError, match="stopped"):
        generate(questions)
    assert model.get_base_model().generation_config is before


# ---- several adapters


@pytest.fixture
def two_adapters():
    """ "default" of 3 and 3 experts, "wide" of 5 and 2 in some of the layers."""
    model = small_llava.small_adapter(small_llava.small_llava())
    options = {"r": 2, "num_vu_experts": 5, "num_if_experts": 2, "task_type": "CAUSAL_LM"}
    model.add_adapter("wide", smolora.SMoLoRAConfig(**options, target_modules=["up_proj", "down_proj"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".wide." in name and name.endswith(("_B", "_router")):
                parameter.normal_(generator=torch.Generator().manual_seed(len(name)))
    return model.eval()


def test_each_adapter_is_recorded_with_its_own_experts(generate, questions, whole, two_adapters):
    settings = replace(BATCHED, routes_per_sample=True)
    first = generate(questions, "default.jsonl", settings, model=two_adapters)
    assert first.read_bytes() == whole.read_bytes() and info(first)["routing"] == info(whole)["routing"]
    two_adapters.set_adapter("wide")
    second = generate(questions, "wide.jsonl", settings, model=two_adapters)
    layers = info(second)["routing"]
    assert len(layers) == 4 and read(second) != read(first)  # two FFN layers, two of their projections
    for layer in layers:
        assert (len(layer["vu"]), len(layer["if"])) == (5, 2) and sum(layer["vu"]) == sum(layer["if"]) == 12
    used = {
        expert for sample in read(second.with_suffix(".routes.jsonl")) for e in sample["layers"] for expert in e["vu"]
    }
    assert max(used) < 5 and used - {0, 1, 2}, "experts that the first adapter does not have"


def test_two_at_once_are_told_apart(generate, questions, two_adapters):
    two_adapters.base_model.set_adapter(["default", "wide"])
    routing = info(generate(questions, model=two_adapters))["routing"]
    sizes = {layer["layer"].rpartition(".")[2]: (len(layer["vu"]), len(layer["if"])) for layer in routing}
    assert sizes["gate_proj"] == sizes["up_proj (default)"] == (3, 3) and sizes["down_proj (wide)"] == (5, 2)
    assert all(sum(layer["vu"]) == layer["samples"] for layer in routing)


@pytest.mark.parametrize("change", ["another", "none"])
def test_answers_by_another_adapter_of_the_model_are_another_run(generate, questions, two_adapters, change):
    """The weights in memory are the same, and so is the name."""
    generate(questions, model=two_adapters)
    with pytest.raises(ValueError, match=r"belongs to another run .weights"):
        if change == "another":
            two_adapters.set_adapter("wide")
            generate(questions, model=two_adapters)
        else:
            with two_adapters.disable_adapter():
                generate(questions, model=two_adapters)


# ---- an offloaded base


def test_a_base_that_is_offloaded_answers_the_same(generate, questions, tmp_path):
    """Its parameters are on no device; accelerate brings them where they run."""
    whole = generate(questions, "whole.jsonl", model=small_llava.small_llava(), embed=None)
    model = small_llava.small_llava()
    disk_offload(model, tmp_path / "offloaded", execution_device="cpu")
    assert all(parameter.is_meta for parameter in model.parameters())
    assert generate(questions, model=model, embed=None).read_bytes() == whole.read_bytes()


# ---- an adapter that finds the task of a question


@pytest.fixture
def selecting(questions):
    """A BranchLoRA adapter for two tasks: the odd questions are of the second one."""
    model = get_peft_model(small_llava.small_llava(), smolora.BranchLoRAConfig(r=2, num_branches=2, num_tasks=2)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("default.B", "default.router")):
                parameter.normal_(generator=torch.Generator().manual_seed(1))
    texts = [record["text"] for record in json.loads(questions.read_text())]
    for task in (0, 1):
        model.selector().add(task, None, small_llava.embed_questions(texts[task::2]))
    return model


def test_the_task_of_each_answer_is_kept(generate, questions, selecting):
    whole = generate(questions, model=selecting)
    tasks = info(whole)["tasks"]
    texts = small_llava.embed_questions([record["text"] for record in json.loads(questions.read_text())])
    pictures = info(whole)["count"] - 3
    assert tasks[pictures:] == selecting.selector().select(None, texts).tolist()[pictures:] and set(tasks) == {0, 1}
    one = replace(BATCHED, token_budget=1)
    alone = generate(questions, "alone.jsonl", one, model=selecting)
    assert info(alone)["tasks"] == tasks and read(alone) == read(whole)


def test_an_adapter_without_tasks_keeps_none(whole):
    assert "tasks" not in info(whole)


def test_other_keys_are_another_run(generate, questions, selecting):
    generate(questions, model=selecting)
    selecting.selector().add(0, None, torch.randn(1, 384))
    with pytest.raises(ValueError, match=r"belongs to another run .weights"):
        generate(questions, model=selecting)
