"""The example runs from end to end, and trains the same with the paper's equations in place of the fused layer."""

import importlib.util
import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

EXAMPLE = Path(__file__).parents[2] / "examples" / "drop_in.py"


@pytest.fixture(scope="module")
def drop_in() -> ModuleType:
    """The example as a module; a fixture, since it imports sentence-transformers, which takes seconds."""
    spec = importlib.util.spec_from_file_location("drop_in", EXAMPLE)
    module = sys.modules["drop_in"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def embeddings(drop_in) -> dict[str, torch.Tensor]:
    return drop_in.embed_instructions()


@pytest.fixture(autouse=True)
def one_thread():
    """As the example runs; at these sizes a second thread mostly waits, for seconds where the cores are shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def small(drop_in):
    """A model and runs small enough for the reference, which loops over instances and experts."""
    return drop_in.Settings(hidden=48, layers=2, rank=4, alpha=8, batch=4, align_steps=20, task_steps=3, test_images=6)


def test_embeddings_are_minilms(embeddings):
    """One embedding a task, of MiniLM's size, and not the same one twice."""
    word, sentence = embeddings["word"], embeddings["sentence"]
    assert word.shape == sentence.shape == (384,)
    assert word.isfinite().all() and sentence.isfinite().all()
    assert torch.cosine_similarity(word, sentence, dim=0) < 0.9


def test_prompt_mask_is_valid_and_no_answer(drop_in, small):
    """The mask given in training covers what generation starts from, token for token: routes depend on it."""
    inputs, prompt = drop_in.Digits(0).batch("align", 16, np.random.default_rng(0))
    for ids, labels, valid, mask in zip(
        inputs["input_ids"], inputs["labels"], inputs["attention_mask"], prompt, strict=True
    ):
        answered = labels != -100
        assert not (mask & answered).any() and torch.equal(mask | answered, valid.bool())
        question = " ".join(drop_in.VOCABULARY[i] for i in ids[mask] if i > drop_in.IMAGE)
        assert question in drop_in.QUESTIONS
        assert torch.equal(ids[mask], drop_in.prompt_tokens(question))


def test_routes_of_generation_are_those_of_training(drop_in, small, embeddings):
    """One sample routes alike in a training forward and in every step of generation, in every layer."""
    data, context = drop_in.Digits(0), drop_in.Context()
    model = drop_in.add_smolora(drop_in.make_model(small), small, context).eval()
    layers = [module.adapter for module in model.modules() if isinstance(module, drop_in.Routed)]
    assert len(layers) == 3 * small.layers + 2
    inputs, context.prompt = data.batch("sentence", 3, np.random.default_rng(0))
    context.instruction = embeddings["sentence"].expand(3, -1)
    model(**inputs)
    trained = [layer.last_routing().routes for layer in layers]
    instruction = drop_in.INSTRUCTIONS["sentence"]
    drop_in.answer(model, inputs["pixel_values"], instruction, context, embeddings["sentence"])
    assert context.prompt.shape[1] > inputs["input_ids"].shape[1] - 10 and not context.prompt.all()
    for before, layer in zip(trained, layers, strict=True):
        for a, b in zip(before, layer.last_routing().routes, strict=True):
            assert torch.equal(a, b)


def test_lora_is_of_the_active_rank_and_in_the_same_places(drop_in, small):
    """What "equal rank" says: 2r on the same layers, under the same scale."""
    model = drop_in.add_lora(drop_in.make_model(small), small, drop_in.Context())
    adapted = {name: m for name, m in model.named_modules() if hasattr(m, "lora_A")}
    assert len(adapted) == 3 * small.layers + 2
    for layer in adapted.values():
        assert layer.lora_A["default"].weight.shape[0] == 2 * small.rank
        assert layer.scaling["default"] == small.alpha / small.rank


@pytest.mark.parametrize(
    ("task", "text", "right"),
    [
        ("word", "seven", True),
        ("word", "", False),
        ("word", "seven .", False),
        ("word", "a red seven", False),
        ("word", "<pad>", False),
        ("sentence", "a person wrote a red seven on a black wall .", True),
        ("sentence", "a person wrote a blue", False),
        ("sentence", "a person wrote . a red seven .", False),
        ("sentence", "seven .", False),
        ("sentence", "", False),
    ],
)
def test_format(drop_in, task, text, right):
    assert drop_in.in_format(task, text) is right


def test_runs_from_end_to_end(drop_in, small, tmp_path, capsys):
    """A table, a PNG and a JSON come out; the aligned model is kept and used again, and a second run is the same."""
    first = drop_in.run(small, tmp_path)
    kept = list(tmp_path.glob("aligned-*.safetensors"))
    assert len(kept) == 1 and not list(tmp_path.glob("*.unfinished"))
    assert "PEFT LoRA, rank 8" in (printed := capsys.readouterr().out) and "SMoLoRA, rank 4 + 4" in printed
    assert (tmp_path / "drop_in.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "drop_in.json").read_text()) == first
    written = kept[0].stat().st_mtime_ns
    second = drop_in.run(small, tmp_path)
    assert kept[0].stat().st_mtime_ns == written
    for name, run in first["runs"].items():
        assert len(run["stages"]) == 2 and len(run["losses"]) == 2 * small.task_steps
        assert np.isfinite(run["losses"]).all()
        assert run["losses"] == second["runs"][name]["losses"]


def test_losses_equal_the_references_over_200_steps(drop_in, small, embeddings, tmp_path, monkeypatch):
    """Same seeds and dropout masks: losses within 1e-3 in each of 200 steps, through both tasks."""
    settings = replace(small, align_steps=150, align_lr=3e-3, task_steps=100, task_lr=5e-3)
    data = drop_in.Digits(settings.seed)
    model = drop_in.align(settings, data, tmp_path)
    calls = []

    def counted(*args, **kwargs) -> torch.Tensor:
        calls.append(kwargs["seed"])
        return smolora_forward(*args, **kwargs)

    def losses(settings, **kwargs) -> np.ndarray:
        add = partial(drop_in.add_smolora, **kwargs)
        return np.array(drop_in.run_sequence("run", add, model, data, settings, embeddings)["losses"])

    smolora_forward = drop_in.smolora_forward
    monkeypatch.setattr(drop_in, "smolora_forward", counted)
    fused = losses(settings)
    assert not calls
    reference = losses(settings, reference=True)
    assert len([seed for seed in calls if seed is not None]) == 200 * (3 * settings.layers + 2)
    assert len(fused) == 200 and fused[100:105].mean() > 3 * fused[-5:].mean()  # the adapter did learn
    assert np.abs(fused - reference).max() < 1e-3
    # the bound bites: without dropout, so with other masks, the losses are further apart
    other = losses(replace(settings, dropout=0.0, task_steps=20))
    assert np.abs(fused[:20] - other[:20]).max() > 1e-3
