"""A whole model that is given no task finds it by its adapter's selector."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn import functional

import smolora
from smolora.methods.selector import Features
from support.tiny_llava import ADAPTED, INSTRUCTION_DIM, batch, embeddings, tiny_llama, tiny_llava

TASKS = 3
OPTIONS = {"branchlora": {"num_branches": 4}, "lilora": {"task_r": 2}, "moecl": {}}
GREEDY = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def config(method: str = "branchlora", **options):
    defaults = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "num_tasks": TASKS, "instruction_dim": INSTRUCTION_DIM}
    return smolora.MIXTURES[method].config(task_type="CAUSAL_LM", **{**defaults, **OPTIONS[method], **options})


def filled(model: nn.Module, adapter: str = "default", seed: int = 1) -> nn.Module:
    """Every tensor of an adapter has values, as after training, so that tasks answer differently."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if f"_experts.{adapter}." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.eval()


def questions(task: int, n: int = 2) -> Tensor:
    """Embeddings of a task's questions."""
    return embeddings(TASKS, seed=7)[task] + 0.1 * embeddings(n, seed=task)


def keyed(model: nn.Module, tasks=range(TASKS), adapter: str | None = None) -> nn.Module:
    """Give an adapter keys of text alone: the same pictures are asked for every task."""
    for task in tasks:
        model.selector(adapter).add(task, None, questions(task, 5))
    return model


def adapted(method: str = "branchlora", tasks=range(TASKS), **options) -> nn.Module:
    return keyed(filled(get_peft_model(tiny_llava(), config(method, **options))), tasks)


def forward(model: nn.Module, inputs: dict, **given) -> Tensor:
    with torch.no_grad():
        return model(**inputs, **given).logits


def mixed() -> tuple[dict, Tensor, Tensor]:
    """A batch of three samples, the embeddings of their questions, and their tasks."""
    tasks = torch.tensor([2, 0, 1])
    return batch((5, 9, 7)), torch.stack([questions(int(t), 1)[0] for t in tasks]), tasks


@pytest.mark.parametrize("method", list(OPTIONS))
def test_the_selected_task_answers(method: str):
    """As if its id had been given; explicit ids win."""
    model = adapted(method)
    inputs, text, tasks = mixed()
    assert torch.equal(
        forward(model, inputs, instruction_embeds=text), expected := forward(model, inputs, task_ids=tasks)
    )
    assert model.last_tasks().tolist() == tasks.tolist()
    other = tasks.roll(1)
    given = forward(model, inputs, instruction_embeds=text, task_ids=other)
    assert torch.equal(given, forward(model, inputs, task_ids=other)) and model.last_tasks().tolist() == other.tolist()
    assert (given - expected).abs().max() > 1e-3


@pytest.mark.parametrize("method", list(OPTIONS))
@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"num_beams": 2}], ids=["cache", "no cache", "beams"])
def test_generate_keeps_the_choice(method: str, options: dict):
    model = adapted(method)
    inputs, text, tasks = mixed()
    answers = model.generate(**inputs, instruction_embeds=text, **GREEDY, **options)
    assert torch.equal(answers, model.generate(**inputs, task_ids=tasks, **GREEDY, **options))
    assert model.last_tasks()[:: options.get("num_beams", 1)].tolist() == tasks.tolist()
    for i in range(3):  # one by one
        own = {name: value[i : i + 1] for name, value in inputs.items()}
        alone = model.generate(**own, instruction_embeds=text[i : i + 1], **GREEDY, **options)
        assert torch.equal(alone[0], answers[i])


def test_a_loop_of_ones_own_keeps_the_choice():
    """The forwards that go on with a cache give no question."""
    model, (inputs, text, tasks) = adapted(), mixed()
    with torch.no_grad():
        first = model(**inputs, instruction_embeds=text, use_cache=True)
        token = first.logits[:, -1:].argmax(-1)
        mask = functional.pad(inputs["attention_mask"], (0, 1), value=1)
        step = {"input_ids": token, "attention_mask": mask, "past_key_values": first.past_key_values}
        chosen = model(**step).logits
        started = model(**inputs, task_ids=tasks, use_cache=True)
        given = model(**{**step, "past_key_values": started.past_key_values}).logits
    assert torch.equal(chosen, given) and model.last_tasks().tolist() == tasks.tolist()


def test_features_are_the_towers_without_adapters():
    """CLIP's pooled output for each image; those of a sample are added, and a sample without any has zeros."""
    targets = [*(name.removeprefix("model.") for name in ADAPTED), "vision_tower.*q_proj"]
    model = filled(get_peft_model(tiny_llava(), config(target_modules=rf".*({'|'.join(targets)})")))
    plain = tiny_llava()
    inputs, text = batch((5, 9, 7), images=(1, 0, 2)), embeddings(3)
    found = model.sample_features(**inputs, instruction_embeds=text)
    with torch.no_grad():
        pooled = functional.normalize(plain.model.vision_tower(inputs["pixel_values"]).pooler_output)
    expected = torch.stack([pooled[0], torch.zeros(16), pooled[1] + pooled[2]])
    torch.testing.assert_close(found.image, functional.normalize(expected))
    assert torch.equal(found.text, text)
    model.selector().add(0, *found)
    model(**inputs, instruction_embeds=text)  # the tower's adapters run in the forward itself
    assert model.last_tasks().tolist() == [0, 0, 0]


def test_images_choose():
    """Keys of images alone: pictures of three sorts, each question asked with one of them."""
    model = filled(get_peft_model(tiny_llava(), config()))
    sorts = torch.randn(TASKS, 3, 28, 28, generator=torch.Generator().manual_seed(3))
    for task in range(TASKS):
        pictures = sorts[task] + 0.1 * torch.randn(4, 3, 28, 28, generator=torch.Generator().manual_seed(task))
        inputs = {**batch((4,) * 4), "pixel_values": pictures}
        image = model.sample_features(**inputs).image
        model.selector().add(task, image, None)
    inputs, _, tasks = mixed()
    inputs["pixel_values"] = sorts[tasks]
    forward(model, inputs)
    assert model.last_tasks().tolist() == tasks.tolist()


@pytest.mark.parametrize("method", list(OPTIONS))
@pytest.mark.parametrize("keys", ["closed", "trained"])
def test_keys_are_saved_with_the_adapter(method: str, keys: str, tmp_path):
    model = filled(get_peft_model(tiny_llava(), config(method, keys=keys)))
    selector = model.selector()
    if keys == "closed":
        keyed(model, (0, 2))
    else:
        selector(torch.tensor([0, 2]), None, torch.cat([questions(0, 1), questions(2, 1)]))
    model.save_pretrained(tmp_path)
    inputs, text, _ = mixed()
    expected = forward(model, inputs, instruction_embeds=text)
    for name in ("default", "other"):
        loaded = PeftModel.from_pretrained(tiny_llava(), tmp_path, adapter_name=name).eval()
        assert torch.equal(forward(loaded, inputs, instruction_embeds=text), expected)
        assert loaded.selector().learned.tolist() == [True, False, True]
        assert not any(p.requires_grad for p in loaded.selector().parameters())
        assert torch.equal(forward(copy.deepcopy(loaded), inputs, instruction_embeds=text), expected)
    trained = PeftModel.from_pretrained(tiny_llava(), tmp_path, is_trainable=True)
    assert all(p.requires_grad for p in trained.selector().parameters())
    assert len(list(trained.selector().parameters())) == (2 if keys == "trained" else 0)
    quick = PeftModel.from_pretrained(tiny_llava(), tmp_path, low_cpu_mem_usage=True).eval()
    assert torch.equal(forward(quick, inputs, instruction_embeds=text), expected)
    own = tiny_llava()
    own.load_adapter(str(tmp_path))  # by transformers
    assert torch.equal(forward(own, inputs, instruction_embeds=text), expected)


def test_an_adapter_without_its_keys_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    adapted().save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    gone = next(name for name in tensors if name.endswith("_selector.text_sums"))
    save_file({name: t for name, t in tensors.items() if name != gone}, path)
    with pytest.raises(KeyError, match=r"missing.*text_sums"):
        PeftModel.from_pretrained(tiny_llava(), tmp_path)


def test_each_adapter_has_keys_of_its_own():
    model = adapted(tasks=(0, 1))
    model.add_adapter("other", config(num_tasks=2))
    filled(model, "other", seed=2)
    inputs, text, tasks = mixed()
    forward(model, inputs, instruction_embeds=text)
    first = model.last_tasks().tolist()
    assert set(first) == {0, 1}
    model.set_adapter("other")
    with pytest.raises(ValueError, match="task_ids must be given"):
        forward(model, inputs, instruction_embeds=text)
    model.selector().add(0, None, questions(2))
    model.selector("other").add(1, None, questions(0))
    forward(model, inputs, instruction_embeds=text)
    assert model.last_tasks().tolist()[:2] == [0, 1]
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match=r"task_ids \(or experts\) must be given where several active adapters"):
        forward(model, inputs, instruction_embeds=text)
    with pytest.raises(ValueError, match="adapter_name must be given where several are active"):
        model.selector()
    forward(model, inputs, task_ids=tasks.clamp(max=1))
    assert model.get_model_status().available_adapters == ["default", "other"]
    model.base_model.set_adapter("default")
    forward(model, inputs, instruction_embeds=text)
    assert model.last_tasks().tolist() == first
    model.delete_adapter("other")
    with pytest.raises(ValueError, match="adapter_name must be one of the model's"):
        model.selector("other")
    assert not [name for name in model.state_dict() if ".other." in name]
    assert not [name for name in model.unload().state_dict() if "selector" in name]


@pytest.mark.parametrize("keys", ["closed", "trained"])
def test_what_trains(keys: str):
    """The base is frozen, and keys train only where a loss trains them."""
    model = get_peft_model(tiny_llava(), config(keys=keys))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    own = {name for name in trained if "_selector." in name}
    assert len(own) == (2 if keys == "trained" else 0)
    assert all(".branchlora_experts." in name for name in trained - own) and len(trained - own) == 3 * len(ADAPTED)


def test_one_task_needs_no_choice():
    model = filled(get_peft_model(tiny_llava(), config(num_tasks=1)))
    inputs, *_ = mixed()
    assert torch.equal(forward(model, inputs), forward(model, inputs, task_ids=0))
    assert model.train()(**inputs, labels=inputs["input_ids"]).loss.isfinite()
    assert model.last_tasks().tolist() == [0, 0, 0]


def test_a_text_model():
    model = keyed(filled(get_peft_model(tiny_llama(), config())))
    assert model.selector().keys()[0].shape == (TASKS, 0) and model.peft_config["default"].image_dim == 0
    inputs, text, tasks = mixed()
    del inputs["pixel_values"]
    assert torch.equal(forward(model, inputs, instruction_embeds=text), forward(model, inputs, task_ids=tasks))


def test_packed_samples():
    """Each sample in a row has its question and its images."""
    model = adapted()
    first, second = batch((5,), seed=1), batch((9,), seed=2)
    tasks = torch.tensor([1, 2])
    text = torch.stack([questions(1, 1)[0], questions(2, 1)[0]])
    lengths = [row["input_ids"].shape[1] for row in (first, second)]
    packed = {
        "input_ids": torch.cat([first["input_ids"], second["input_ids"]], 1),
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
        "pixel_values": torch.cat([first["pixel_values"], second["pixel_values"]]),
    }
    chosen = forward(model, packed, instruction_embeds=text)
    assert torch.equal(chosen, forward(model, packed, task_ids=tasks)) and model.last_tasks().tolist() == [1, 2]
    apart = [model.sample_features(**row).image for row in (first, second)]
    torch.testing.assert_close(model.sample_features(**packed).image, torch.cat(apart))


def test_threads_do_not_see_each_others_features():
    """While one thread reads features, without adapters, another one's forward has them."""
    model, (inputs, text, tasks) = adapted(), mixed()
    expected = forward(model, inputs, task_ids=tasks)
    wrong = []

    def ask():
        for _ in range(5):
            if not torch.equal(forward(model, inputs, instruction_embeds=text), expected):
                wrong.append(1)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("method", list(OPTIONS))
def test_without_keys_the_task_is_asked_for(method: str):
    model, (inputs, text, _) = adapted(method, ()), mixed()
    with pytest.raises(ValueError, match=r"task_ids must be given to the model's forward.*TaskSelector has keys"):
        model(**inputs, instruction_embeds=text)
    with pytest.raises(ValueError, match="task_ids must be given to the model's forward"):
        model.generate(**inputs, instruction_embeds=text, **GREEDY)


def test_bad_input():
    model, (inputs, text, _) = adapted(tasks=(0, 2)), mixed()
    only_text = {name: value for name, value in batch((5, 9), images=(0, 0)).items()}
    with pytest.raises(
        ValueError, match="instruction_embeds or pixel_values must be given, by which the adapter finds"
    ):
        model(**only_text)
    with pytest.raises(ValueError, match=r"instruction_embeds must have shape \(3, 12\).*got \(2, 12\)"):
        model(**inputs, instruction_embeds=text[:2])
    with pytest.raises(TypeError, match="instruction_embeds must be a floating point tensor, got str"):
        model(**inputs, instruction_embeds="What?")
    with pytest.raises(ValueError, match=r"task_ids must be of tasks that the adapter has learned, \[0, 2\], got \[1"):
        model.generate(**inputs, task_ids=1, **GREEDY)
    with pytest.raises(ValueError, match="task_ids must be given to the model's forward"):
        model.train()(**inputs, instruction_embeds=text, labels=inputs["input_ids"])
    with pytest.raises(ValueError, match="adapter_name must name an adapter with a selector"):
        get_peft_model(tiny_llava(), smolora.MoELoRAConfig(r=2)).selector()


def test_gradients_do_not_reach_the_tower():
    model, (inputs, text, _) = adapted(), mixed()
    found = model.sample_features(**inputs, instruction_embeds=text.requires_grad_())
    assert isinstance(found, Features) and not found.image.requires_grad
