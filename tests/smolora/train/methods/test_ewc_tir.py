"""EWC with TIR: vectors of tasks, their similarity, and importances that are damped for one stage or for good."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import BertConfig, BertModel, BertTokenizer

from smolora.recipe import load_recipe
from smolora.train.methods import Method
from smolora.train.methods.fisher import trained
from smolora.train.methods.task_vectors import KINDS, ClassToken, similarity
from smolora.train.run import TrainingRun
from support.train_world import SENTENCE, work_of


def begin(world: Path, *overrides: str, adapter: str = "lora"):
    method = f"method={{adapter: {adapter}, schedule: [ewc-tir]}}"
    run = TrainingRun(load_recipe(world, [method, "output=no/such/run", "methods.ewc-tir.samples=4", *overrides]))
    run.load_processors()
    torch.manual_seed(0)
    model = run.method.adapter.start(run.base_model(), None)
    with torch.no_grad():
        for parameter in trained(model).values():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return run, model


def a_stage(run, model, stage, kept: tuple[Path, ...], folder: Path):
    """A stage's hooks, of a new process; what pulled, and the file that it left."""
    hooks, work = Method(run.recipe).hooks[1], work_of(run, stage, kept)
    hooks.before_stage(model, work)
    pull = hooks._importance
    folder.mkdir()
    hooks.after_stage(model, work, folder)
    return pull, load_file(folder / "ewc-tir.safetensors")


# ---- similarity


def test_similarity_of_two_tasks_is_the_product_of_cosines():
    one = [torch.tensor([1.0, 0.0]), torch.tensor([0.6, 0.8]), torch.tensor([1.0])]
    other = [torch.tensor([0.6, 0.8]), torch.tensor([0.8, 0.6]), torch.tensor([1.0])]
    assert similarity([one, other]).tolist() == pytest.approx([0.6 * 0.96])
    opposite = [-one[0], *other[1:]]
    assert similarity([one, opposite]).tolist() == [0.0]


def test_similarity_of_several_tasks_by_hand():
    """Cosines of all pairs, standardised over the pairs, and a sigmoid; the newest task is compared with each."""
    angles = {"image": [0, 10, 50, 80], "instruction": [0, 90, 45, 20], "answer": [5, 5, 5, 5]}
    vectors = [
        [torch.tensor([math.cos(math.radians(of[t])), math.sin(math.radians(of[t]))]) for of in angles.values()]
        for t in range(4)
    ]
    wanted = [1.0, 1.0, 1.0]
    for of in angles.values():
        cosines = {(a, b): math.cos(math.radians(of[a] - of[b])) for a in range(4) for b in range(a + 1, 4)}
        mean = sum(cosines.values()) / 6
        deviation = math.sqrt(sum((value - mean) ** 2 for value in cosines.values()) / 5)
        for k in range(3):
            score = (cosines[k, 3] - mean) / deviation if deviation > 1e-9 else 0.0
            wanted[k] *= 1 / (1 + math.exp(-score))
    assert similarity(vectors).tolist() == pytest.approx(wanted, abs=1e-6)
    assert wanted[0] != pytest.approx(wanted[2], abs=0.01)


@pytest.mark.parametrize("tasks", [3, 4, 6])
def test_cosines_that_differ_by_rounding_count_as_equal(tasks):
    """Tasks that share their instruction would else be told apart by the last bit of its embedding."""
    torch.manual_seed(0)
    for _ in range(20):
        shared = F.normalize(torch.randn(64, dtype=torch.float64), dim=0)
        near = [F.normalize(shared + 1e-8 * torch.randn(64, dtype=torch.float64), dim=0) for _ in range(tasks)]
        for vectors in ([shared] * tasks, near):
            assert similarity([[vector] for vector in vectors]).tolist() == pytest.approx([0.5] * (tasks - 1))


def test_no_importance_is_damped_below_zero():
    """The cosine of a vector with itself may be above 1 by rounding."""
    torch.manual_seed(0)
    vectors = F.normalize(torch.randn(100, 5, dtype=torch.float64), dim=1)
    assert max(float((vector * vector).sum()) for vector in vectors) > 1
    assert all(float(similarity([[vector], [vector]])[0]) <= 1 for vector in vectors)


# ---- vectors


@pytest.mark.parametrize("adapter", ["lora", "smolora"])
def test_vectors_by_their_definition(world, tmp_path, adapter):
    """The normalised means of the tower's class tokens, of the whole questions' and of the answers' embeddings."""
    run, model = begin(world, "methods.ewc-tir.vector_samples=6", adapter=adapter)
    model.train()
    stage = run.method.course.stages()[1]
    _, left = a_stage(run, model, stage, (), tmp_path / "kept")
    assert model.training and trained(model)
    work = work_of(run, stage)
    tower = run.base_model().eval().model.vision_tower
    with torch.no_grad():
        pixels = torch.cat([work.collate([work.samples[index]])["pixel_values"] for index in (0, 2, 4, 6, 8, 10)])
        classes = tower(pixels).pooler_output
    from smolora.instructions.encoder import InstructionEncoder

    encoder = InstructionEncoder(device="cpu")
    records = run._task_samples(run.recipe.tasks[1]).samples
    answers = [records[index].answer for index in (0, 2, 4, 6, 8, 10)]
    wanted = {"image": classes, "instruction": encoder.encode([SENTENCE] * 6), "answer": encoder.encode(answers)}
    assert len(set(answers)) > 1
    for kind, rows in wanted.items():
        vector = F.normalize(rows.double().mean(0), dim=0)
        torch.testing.assert_close(left[f"vectors.{kind}"], vector[None], rtol=1e-5, atol=1e-6)


@pytest.fixture
def bert(tmp_path) -> Path:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(200))]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "bert")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    BertModel(config).save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


def test_the_class_token_of_a_bert(bert, tmp_path):
    """Of a long text the end is read, since the instruction is there; texts in a batch do not change each other."""
    encode = ClassToken(str(bert), torch.device("cpu"))
    long = " ".join(f"w{i}" for i in range(200))
    end = " ".join(f"w{i}" for i in range(200 - 126, 200))  # with its two special tokens, 128
    rows = encode([long, end, "w1 w2", "w2 w1"])
    assert rows.shape == (4, 16)
    torch.testing.assert_close(rows[0], rows[1])
    torch.testing.assert_close(rows[2:3], encode(["w1 w2"]), rtol=1e-4, atol=1e-5)
    assert (rows[2] - rows[3]).abs().max() > 1e-4


def test_an_encoder_that_is_not_there_is_told_at_once(short):
    for key in ("methods.ewc-tir.encoder", "instructions.encoder"):
        with pytest.raises(ValueError, match=f"{key} must be the folder of an encoder, got 'no/such'"):
            Method(short("method=ewc-tir", f"{key}=no/such"))


# ---- importances


def test_a_copy_is_damped(world, tmp_path, monkeypatch):
    """The largest importance and its task, damped by that task's similarity for a stage or, as released, for good."""
    run, model = begin(world)
    first, second = run.method.course.stages()
    third = dataclasses.replace(run.method.course.downstream()[-1], table=None)
    names = list(trained(model))
    _, one = a_stage(run, model, first, (), tmp_path / "one")
    importance, owner = one[f"importance.{names[0]}"], one[f"task.{names[0]}"]
    assert owner.dtype == torch.uint8 and not owner.any()
    total = sum(float(one[f"importance.{name}"].double().sum()) for name in names)
    assert total / sum(one[f"importance.{name}"].numel() for name in names) == pytest.approx(1, rel=1e-5)
    pull, two = a_stage(run, model, second, (tmp_path / "one",), tmp_path / "two")
    vectors = [[two[f"vectors.{kind}"][task] for kind in KINDS] for task in range(2)]
    freed = float(similarity(vectors)[0])
    assert 0 < freed < 1
    torch.testing.assert_close(pull[names[0]], importance * (1 - freed))
    later, owners = two[f"importance.{names[0]}"], two[f"task.{names[0]}"]
    assert (later >= importance).all() and 0 < owners.float().mean() < 1
    assert torch.equal(later[owners == 0], importance[owners == 0]), "damping a copy leaves what is kept"
    assert (later[owners == 1] > importance[owners == 1]).all()
    pull, _ = a_stage(run, model, third, (tmp_path / "one", tmp_path / "two"), tmp_path / "three")
    three = load_file(tmp_path / "three/ewc-tir.safetensors")
    vectors = [[three[f"vectors.{kind}"][task] for kind in KINDS] for task in range(3)]
    freed_of = similarity(vectors).float()
    torch.testing.assert_close(pull[names[0]], later * (1 - freed_of[owners.long()]))
    compound, model = begin(world, "methods.ewc-tir.compound=true")
    _, released = a_stage(compound, model, second, (tmp_path / "one",), tmp_path / "released")
    kept, of = released[f"importance.{names[0]}"], released[f"task.{names[0]}"]
    torch.testing.assert_close(kept[of == 0], importance[of == 0] * (1 - freed))


def test_the_pull_is_to_the_values_that_the_stage_starts_from(world, tmp_path):
    run, model = begin(world, "methods.ewc-tir.weight=2")
    first, second = run.method.course.stages()
    a_stage(run, model, first, (), tmp_path / "one")
    with torch.no_grad():
        for parameter in trained(model).values():
            parameter.add_(0.3)  # as if `one` had ended elsewhere: its end is not the anchor
    hooks = Method(run.recipe).hooks[1]
    hooks.before_stage(model, work_of(run, second, (tmp_path / "one",)))
    with torch.no_grad():
        for parameter in trained(model).values():
            parameter.grad = torch.zeros_like(parameter)
            parameter.add_(0.1)
    hooks.step_term(model, 1.0)
    for name, parameter in trained(model).items():
        torch.testing.assert_close(parameter.grad, 2 * 0.1 * hooks._importance[name], rtol=1e-4, atol=1e-6)
        assert parameter.grad.any()
