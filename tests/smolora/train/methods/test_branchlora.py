"""BranchLoRA in the trainer: counts, freezing, keys, and runs."""

from __future__ import annotations

import dataclasses
import json
import types
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer

from small_llava import small_llava
from smolora import InstructionEncoder, cli
from smolora.data.format import read_questions
from smolora.data.images import ImageTransform
from smolora.data.prompts import PromptEncoder
from smolora.recipe import load_recipe
from smolora.train.data import Collator
from smolora.train.methods import Method
from smolora.train.methods.branchlora import adapted, most_used
from smolora.train.plan import make_plan
from smolora.train.run import TrainingRun
from smolora.tuner.counts import num_trainable

SMALL = ["baseline.rank=8", "baseline.experts=4"]
ADAPTER = "adapter/adapter_model.safetensors"

# ---- what trains


ALL_LINEARS = r"target_modules=.*language_model\..*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


@pytest.mark.parametrize(("method", "published"), [("moelora", 349.9), ("branchlora", 222.4)])
def test_the_published_counts(llava_7b, method, published):
    """Of CoIN's setting: rank 128 over 8 experts on all seven linears, and the projector, which trains in full."""
    options = [f"method={method}", f"adapter.{ALL_LINEARS}", "baseline.rank=128", "baseline.experts=8", "downstream={}"]
    recipe = load_recipe(llava_7b, options)
    with torch.device("meta"):
        base = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(recipe.model.path))
        projector = sum(p.numel() for p in base.model.multi_modal_projector.parameters())
        model = Method(recipe).adapter.start(base.requires_grad_(False), None)
    assert projector == pytest.approx(20.98e6, rel=1e-4)
    sizes = {"gate_proj": (4096, 11008), "up_proj": (4096, 11008), "down_proj": (11008, 4096)}
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "smolora_key")}
    assert len(layers) == 7 * 32
    for name, layer in layers.items():
        d, k = sizes.get(name.rpartition(".")[2], (4096, 4096))
        A = 128 * d if method == "moelora" else 16 * d
        assert layer.experts["default"].num_trained() == A + 128 * k + 8 * d, name
    planned = make_plan(recipe)["memory"]["trainable_parameters"]
    assert planned == num_trainable(model)
    assert round((planned + projector) / 1e6, 1) == published


def test_a_branch_has_its_share_of_the_baselines_rank(short):
    config = Method(short("method=branchlora", *SMALL)).adapter.config(small_llava())
    assert (config.r, config.num_branches, config.scaling) == (2, 4, 2.0)
    assert (config.num_tasks, config.top_k, config.instruction_dim) == (2, 2, 384)


@pytest.mark.parametrize(
    ("option", "routers", "branches", "tasks"),
    [
        ({"top_k": 4, "freeze": False, "routers": "shared"}, 1, 4, 1),  # shared A
        ({"freeze": False, "routers": "shared"}, 1, 2, 1),  # and top-k
        ({"routers": "shared"}, 1, 2, 1),  # and freezing
        ({}, 2, 2, 2),  # and routers and a selector
    ],
    ids=["shared A", "top-k", "freezing", "routers"],
)
def test_the_rows_of_the_papers_ablation(short, option, routers, branches, tasks):
    options = [f"methods.branchlora={json.dumps(option)}", *SMALL]
    adapter = Method(short("method=branchlora", *options)).adapter
    config = adapter.config(small_llava())
    assert (config.num_tasks, config.top_k) == (routers, branches)
    assert adapter.takes_task_ids == (tasks > 1) and adapter.frozen_each() == (2 if option.get("freeze", True) else 0)


def test_a_is_frozen_after_so_many_tasks(short):
    method = Method(short("method=branchlora", "methods.branchlora.freeze_A_after=1", *SMALL))
    trains = []
    for stage in method.course.stages():
        model = method.adapter.start(small_llava(), None)
        method.freeze(model, stage)
        trains.append({experts.A.requires_grad for experts in adapted(model)})
    assert trains == [{True}, {False}]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("methods.branchlora.freeze=5", r"methods\.branchlora\.freeze must be at most the 4 branches, got 5"),
        ("methods.branchlora.top_k=5", r"methods\.branchlora\.top_k must be at most the 4 branches, got 5"),
        ("methods.branchlora.branches=3", "baseline.rank must be a multiple of the 3 branches of branchlora, got 8"),
        ("methods.branchlora.key=closed", r"methods\.branchlora.*keys"),
        ("methods.branchlora.keys=open", r"methods\.branchlora\.keys"),
        ("methods.branchlora.alignment=-1", r"methods\.branchlora\.alignment"),
    ],
)
def test_bad_options(short, option, message):
    with pytest.raises(ValueError, match=message):
        Method(short("method=branchlora", *SMALL, option))


# ---- which branches are frozen


def test_the_most_used_are_frozen():
    usage = torch.tensor([4, 0, 7, 4, 1])
    none = torch.zeros(5, dtype=torch.bool)
    assert most_used(usage, none, 2, "all").tolist() == [True, False, True, False, False]
    frozen = torch.tensor([False, False, True, False, False])
    assert most_used(usage, frozen, 2, "all").tolist() == [True, False, True, False, False]
    assert most_used(usage, frozen, 2, "tunable").tolist() == [True, False, False, True, False]
    assert most_used(usage, ~none, 2, "tunable").any().item() is False  # there are no more
    assert most_used(usage, none, 5, "all").tolist() == [True, False, True, True, True], "that is never used"
    assert not most_used(usage, none, 0, "all").any()


# ---- runs


def tensors(run: Path, stage: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix("base_model.model."): t for name, t in load_file(run / stage / ADAPTER).items()}


STAGES = ("stage-1-ImageNet", "stage-2-Flickr30k")


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory) -> Path:
    """A run of both tasks and the few-shot one."""
    folder = tmp_path_factory.mktemp("branchlora") / "run"
    quick = ["training.batch_size=6", "training.per_device_batch_size=3", "evaluation.max_new_tokens=2"]
    recipe = load_recipe(world, ["method=branchlora", *SMALL, f"output={folder}", "training.epochs=1", *quick])
    results = TrainingRun(recipe)()
    assert results["config"]["methods"]["branchlora"]["branches"] == 4
    assert results["task_source"] == "selector"
    assert results["selected"] == [{"ImageNet": [4, 0, 0, 0]}, {"ImageNet": [4, 0, 0, 0], "Flickr30k": [0, 4, 0, 0]}]
    return folder


def test_older_routers_and_frozen_branches_keep_their_bits(finished):
    first, second = (tensors(finished, stage) for stage in STAGES)
    changed = {"A": 0, "B": 0, "router": 0}
    for name in (name for name in first if name.endswith("frozen_branches")):
        layer = name.removesuffix("frozen_branches")
        frozen = first[name]
        assert 0 < frozen.sum() <= 2 and (second[name] | ~frozen).all()
        for part in changed:
            before, after = first[layer + part], second[layer + part]
            keeps = {"A": slice(0), "B": frozen, "router": slice(1)}[part]
            assert torch.equal(before[keeps], after[keeps])
            changed[part] += not torch.equal(before, after)
    assert all(changed.values())


def test_what_is_frozen_is_what_was_used_most(finished, world):
    """Counted anew, sample by sample, with the adapter as it was saved after the first stage."""
    recipe = load_recipe(world, ["method=branchlora", *SMALL])
    run = TrainingRun(dataclasses.replace(recipe, output=str(finished.parent / "other")))
    run.load_processors()
    samples, collate = run._task_samples(recipe.tasks[0]), Collator(run.backbone, recipe.training.max_length, run.dtype)
    model = run.method.adapter.load(run.base_model(), finished / STAGES[0] / "adapter").eval()
    usage = [torch.zeros(4, dtype=torch.long) for _ in adapted(model)]
    with torch.no_grad():
        for sample in samples:
            model(**collate([sample]))
            for count, experts in zip(usage, adapted(model), strict=True):
                count += experts.last_routing().ids.flatten().long().bincount(minlength=4)
    for count, experts in zip(usage, adapted(model), strict=True):
        assert count.sum() == 2 * len(samples)
        chosen = sorted(range(4), key=lambda branch: (-count[branch], branch))[:2]
        assert experts.frozen_branches.nonzero().flatten().tolist() == sorted(b for b in chosen if count[b])


def test_keys_come_with_each_stage(finished):
    learned = [tensors(finished, stage)["adapter_selectors.branchlora_selector.learned"].tolist() for stage in STAGES]
    assert learned == [[True, False, False], [True, True, False]]
    few_shot = tensors(finished, "downstream-few-shot/Places365, 2-shot")
    assert few_shot["adapter_selectors.branchlora_selector.learned"].tolist() == [True, True, True]


def test_answers_say_which_task_was_chosen(finished):
    info = json.loads((finished / STAGES[1] / "answers/Flickr30k.info.json").read_text())
    assert len(info["tasks"]) == info["count"] and set(info["tasks"]) == {1}  # its question is another one


def test_the_adapter_answers_outside_of_the_trainer(finished, world):
    """With no task id, by what it is saved with: as it answered after the last stage."""
    recipe = load_recipe(world)
    model = AutoModelForImageTextToText.from_pretrained(recipe.model.path, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, finished / STAGES[1] / "adapter").eval()
    encoder = PromptEncoder.for_model(AutoTokenizer.from_pretrained(recipe.model.path), model.config)
    transform = ImageTransform.from_pretrained(recipe.model.path)
    texts = InstructionEncoder()
    for task in recipe.tasks:
        answers = finished / STAGES[1] / f"answers/{task.name}.jsonl"
        for record, line in zip(read_questions(recipe.test_file(task)), answers.read_text().splitlines(), strict=True):
            ids = torch.tensor([encoder.expand(encoder.prompt(record.text, True))])
            written = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                pixel_values=transform(recipe.images(task) / record.image)[None],
                instruction_embeds=texts.encode([record.text]),
                max_new_tokens=2,
                do_sample=False,
            )
            end = encoder.tokenizer.eos_token_id
            new = [token for token in written[0, ids.shape[1] :].tolist() if token != end]
            assert encoder.decode(new) == json.loads(line)["text"]


@pytest.mark.parametrize("by", ["recipe", "options"])
def test_the_evaluator_gives_the_runs_answers(finished, world, tmp_path, by):
    """`smolora evaluate` embeds whole questions for an adapter that finds its task by them."""
    recipe = load_recipe(world)
    given = ["--recipe", str(world), "evaluation.max_new_tokens=2", "--task", "ImageNet"]
    if by == "options":
        folders = ["--annotations", str(recipe.test_file(recipe.tasks[0]).parent), "--images", str(recipe.data.root)]
        given = ["--model", recipe.model.path, "--task", "ImageNet", *folders, "--max-new-tokens", "2"]
    adapter = ["--adapter", str(finished / STAGES[1] / "adapter"), "--device", "cpu", "--model-id"]
    assert cli.main(["evaluate", *given, *adapter, f"small/{STAGES[1]}", "--output", str(tmp_path)]) == 0
    answers = "answers/ImageNet.jsonl"
    assert (tmp_path / answers).read_bytes() == (finished / STAGES[1] / answers).read_bytes()


def test_trained_keys_are_refused_in_several_processes(short):
    adapter = Method(short("method=branchlora", "methods.branchlora.keys=trained", *SMALL)).adapter
    work = types.SimpleNamespace(process=types.SimpleNamespace(num_processes=2))
    with pytest.raises(ValueError, match=r"methods\.branchlora\.keys must be 'closed' with several processes"):
        adapter.before_stage(torch.nn.Identity(), work)


def test_trained_keys(world, tmp_path):
    options = ["methods.branchlora.keys=trained", *SMALL, f"output={tmp_path / 'run'}", "downstream={}"]
    quick = ["training.epochs=1", "evaluation.max_new_tokens=2"]
    TrainingRun(load_recipe(world, ["method=branchlora", *options, *quick]))()
    first, second = (tensors(tmp_path / "run", stage) for stage in STAGES)
    for part in ("image_keys", "text_keys"):
        name = f"adapter_selectors.branchlora_selector.{part}"
        assert torch.equal(first[name][0], second[name][0]) and not torch.equal(first[name][1], second[name][1])
    assert second["adapter_selectors.branchlora_selector.learned"].tolist() == [True, True]
