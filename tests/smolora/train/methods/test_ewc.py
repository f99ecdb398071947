"""EWC in the trainer: what it measures, keeps and pulls; none of it is as inert as in released codes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from smolora.methods.slices import SlicedParameter
from smolora.recipe import load_recipe
from smolora.train.methods import Method, StageWork
from smolora.train.methods.fisher import trained
from smolora.train.plan import make_plan
from smolora.train.run import TrainingRun
from smolora.tuner.counts import num_trainable
from support.train_world import work_of

STAGES = ("stage-1-ImageNet", "stage-2-Flickr30k")


def begin(world: Path, *overrides: str, adapter: str = "lora"):
    """A run with EWC, its hooks, and a model whose adapter is not as it began."""
    method = f"method={{adapter: {adapter}, schedule: [ewc]}}"
    run = TrainingRun(load_recipe(world, [method, "output=no/such/run", *overrides]))
    run.load_processors()
    torch.manual_seed(0)
    model = run.method.adapter.start(run.base_model(), None)
    with torch.no_grad():
        for parameter in trained(model).values():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return run, run.method.hooks[1], model


def keep(run, hooks, model, tmp_path: Path, number: int = 0, kept: tuple[Path, ...] = ()) -> Path:
    """The folder of what EWC keeps after a stage."""
    folder = tmp_path / f"kept-{number}"
    folder.mkdir()
    hooks.after_stage(model, work_of(run, run.method.course.stages()[number], kept), folder)
    return folder


def of_file(folder: Path, part: str) -> dict[str, torch.Tensor]:
    tensors = load_file(folder / "ewc.safetensors")
    return {name.removeprefix(f"{part}."): value for name, value in tensors.items() if name.startswith(f"{part}.")}


def test_fisher_information_by_its_definition(world, tmp_path):
    """Mean over samples, one by one and without dropout, of the squared gradient of -log p(answer), in float64."""
    run, hooks, model = begin(world, "adapter.lora_dropout=0.5", "methods.ewc={samples: 4, scale: raw}")
    model.train()
    folder = keep(run, hooks, model, tmp_path)
    assert model.training
    importance, anchor = of_file(folder, "importance"), of_file(folder, "anchor")
    assert importance.keys() == anchor.keys() == trained(model).keys()
    for name, parameter in trained(model).items():
        assert torch.equal(anchor[name], parameter)
    model = model.double().eval()
    work = work_of(run, run.method.course.stages()[0])
    wanted = {name: torch.zeros_like(parameter) for name, parameter in trained(model).items()}
    for index in (0, 3, 6, 9):
        batch = work.collate([work.samples[index]])
        labels = batch.pop("labels")
        batch["pixel_values"] = batch["pixel_values"].double()
        log_p = F.log_softmax(model(**batch).logits[0, :-1], dim=-1)
        answer = (labels[0, 1:] != -100).nonzero().flatten()
        likelihood = log_p[answer, labels[0, 1:][answer]].sum()
        for total, gradient in zip(
            wanted.values(), torch.autograd.grad(likelihood, list(trained(model).values())), strict=True
        ):
            total += gradient.square() / 4
    for name, value in wanted.items():
        torch.testing.assert_close(importance[name].double(), value, rtol=1e-3, atol=1e-4 * float(value.max()))
        assert value.any(), name


def test_scales_and_batches(world, tmp_path):
    """mean1 has a mean of 1 over what trains; squares of a batch's mean gradient are smaller than those of samples."""
    found = {}
    for number, options in enumerate(({}, {"scale": "raw"}, {"scale": "raw", "fisher": "batch"})):
        run, hooks, model = begin(world, f"methods.ewc={json.dumps(options)}")
        (tmp_path / str(number)).mkdir()
        found[number] = of_file(keep(run, hooks, model, tmp_path / str(number)), "importance")
    total = {number: sum(float(value.double().sum()) for value in values.values()) for number, values in found.items()}
    assert total[0] == pytest.approx(num_trainable(model), rel=1e-5)
    for name, value in found[0].items():
        torch.testing.assert_close(value * (total[1] / total[0]), found[1][name])
    assert 0 < total[2] < total[1] / 2


def test_no_batch_of_a_device_shows_in_fisher_information(world, tmp_path):
    """Groups of `batch` have training.batch_size samples, taken through the model in any number of batches."""
    options = ('methods.ewc={"scale": "raw", "fisher": "batch"}', "training.batch_size=4")
    found = []
    for at_once in (4, 1):
        run, hooks, model = begin(world, *options, f"training.per_device_batch_size={at_once}")
        work = dataclasses.replace(work_of(run, run.method.course.stages()[0]), batch_size=at_once)
        found.append(hooks.fisher(model, work))
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-4, atol=1e-6 * float(value.max()))
        assert value.any()


def test_a_downstream_stage_keeps_nothing(world, tmp_path):
    run, hooks, model = begin(world)
    work = work_of(run, dataclasses.replace(run.method.course.stages()[0], table="downstream-few-shot"))
    hooks.after_stage(model, work, tmp_path)
    assert not any(tmp_path.iterdir())


def test_a_later_stage_is_pulled_to_what_earlier_ones_kept(world, tmp_path):
    """Hooks of a new process read the file; the pull has its scale, and depends on the first task's data."""
    options = 'methods.ewc={"weight": 3.0}'
    run, hooks, model = begin(world, options)
    first, second = run.method.course.stages()
    folder = keep(run, hooks, model, tmp_path)
    importance, anchor = of_file(folder, "importance"), of_file(folder, "anchor")
    other = tmp_path / "other"
    other.mkdir()
    swapped, others, same = begin(world, options, f"tasks.0.train={run.recipe.train_file(run.recipe.tasks[1])}")
    assert of_file(keep(swapped, others, same, other), "importance").keys() == importance.keys()
    pulls = []
    for kept in (folder, other / "kept-0"):
        hooks = Method(run.recipe).hooks[1]
        hooks.before_stage(model, work_of(run, second, (kept,)))
        with torch.no_grad():
            for name, parameter in trained(model).items():
                parameter.copy_(anchor[name] + 0.1)
                parameter.grad = torch.ones_like(parameter)
        assert hooks.figures() == {}
        hooks.step_term(model, 2.0)
        penalty = sum(float(value.double().sum()) for value in of_file(kept, "importance").values()) * 0.1**2 * 3.0 / 2
        if kept == folder:
            assert hooks.figures() == {"penalty": pytest.approx(penalty, rel=1e-3)}
        pulls.append({name: parameter.grad - 1 for name, parameter in trained(model).items()})
    for name, pull in pulls[0].items():
        torch.testing.assert_close(pull, 2.0 * 3.0 * 0.1 * importance[name], rtol=1e-4, atol=1e-5)
        assert pull.any(), "the penalty's gradient is not zero at a drift"
    assert any((pulls[0][name] - pulls[1][name]).abs().max() > 0.01 for name in pulls[0])
    # and the second stage's file has both tasks
    with torch.no_grad():
        for name, parameter in trained(model).items():
            parameter.copy_(anchor[name])
    run, hooks, _ = begin(world, options)
    both = of_file(keep(run, hooks, model, tmp_path, 1, (folder,)), "importance")
    (tmp_path / "alone").mkdir()
    alone = of_file(keep(run, Method(run.recipe).hooks[1], model, tmp_path / "alone", 1), "importance")
    for name, value in both.items():
        torch.testing.assert_close(value, importance[name] + alone[name])
    assert first.lineage == [] and second.lineage == [first]


def test_processes_share_the_samples(world, tmp_path, monkeypatch):
    run, hooks, model = begin(world, "methods.ewc={scale: raw, samples: 7}")
    work = work_of(run, run.method.course.stages()[0])
    whole = hooks.fisher(model, work)
    monkeypatch.setattr(StageWork, "total", lambda self, values: values)
    shares = []
    for index in range(2):
        place = SimpleNamespace(num_processes=2, process_index=index, device=torch.device("cpu"))
        shares.append(hooks.fisher(model, dataclasses.replace(work, process=place)))
    for name, value in whole.items():
        torch.testing.assert_close(shares[0][name] + shares[1][name], value)
        assert shares[0][name].any() and shares[1][name].any()


@pytest.mark.parametrize("adapter", ["smolora", "moelora", "branchlora", "lilora", "moecl"])
def test_on_other_adapters(world, tmp_path, adapter):
    """Every trained parameter has its Fisher information, and what a later stage does not train keeps its bits."""
    run, hooks, model = begin(world, "methods.ewc.samples=3", adapter=adapter)
    first, second = run.method.course.stages()
    run.method.freeze(model, first)
    run.method.after_stage(model, work_of(run, first), tmp_path)
    importance = of_file(tmp_path, "importance")
    assert importance.keys() == trained(model).keys() and all(value.isfinite().all() for value in importance.values())
    run.method.freeze(model, second)
    work = work_of(run, second, (tmp_path,))
    hooks.before_stage(model, work)
    model.train()
    with torch.no_grad():
        for parameter in trained(model).values():
            parameter.add_(0.1)
    drifted = {name: parameter.detach().clone() for name, parameter in trained(model).items()}
    model(**next(work.batches())).loss.backward()
    kept = {
        name: (parameter.grad == 0).flatten(1).all(1)
        for name, parameter in trained(model).items()
        if isinstance(parameter, SlicedParameter) and parameter.grad is not None and parameter.dim() > 1
    }
    gradients = {name: p.grad.clone() for name, p in trained(model).items() if p.grad is not None}
    hooks.step_term(model, 1.0)
    pulled = {name for name, gradient in gradients.items() if not torch.equal(trained(model)[name].grad, gradient)}
    shared = {name for name in gradients if not isinstance(trained(model)[name], SlicedParameter)}
    assert pulled >= {name for name in shared if importance[name].any()} > set()
    torch.optim.AdamW(trained(model).values(), lr=1e-2).step()
    for name, rows in kept.items():
        assert torch.equal(trained(model)[name][rows], drifted[name][rows]), name
    if adapter == "branchlora":
        assert any(rows.any() for rows in kept.values()), "two branches of each layer are frozen"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["methods.ewc.weight=-1"], "methods.ewc.weight must be at least 0, got -1"),
        (["methods.ewc.scale=mean"], "methods.ewc.scale must be one of 'raw', 'mean1', got 'mean'"),
        (["methods.ewc.lambda=1"], "unknown key 'methods.ewc.lambda'"),
        (["method=dmole", "methods.ewc.weight=x"], None),
        (["method={adapter: dmole, schedule: [ewc]}"], "must not have 'ewc' for the adapter 'dmole': each stage train"),
        (["method={adapter: dmole, schedule: [ewc-tir]}"], "must not have 'ewc-tir' for the adapter 'dmole'"),
        (["method={adapter: clora, schedule: [ewc]}"], "must not have 'ewc' for the adapter 'clora'"),
        (["method={adapter: lora, schedule: [joint, ewc]}"], "'sequential' for the add-on 'ewc', .* got 'joint'"),
        (["method={adapter: lora, schedule: [one-per-task, ewc-tir]}"], "add-on 'ewc-tir', .* got 'one-per-task'"),
        (["method={adapter: none, schedule: [none, ewc]}"], "'sequential' for the add-on 'ewc', .* got 'none'"),
        (
            ["method={adapter: lora, schedule: [ewc, replay, ewc-tir]}"],
            "must have one of 'ewc' and 'ewc-tir', .*replay",
        ),
        (["training.arguments.fsdp=true"], "training.arguments.fsdp must be left out for the add-on 'ewc', whose"),
    ],
)
def test_what_is_refused(short, overrides, message):
    recipe = short("method=ewc", *overrides)
    if message is None:  # the section of an add-on that is not used is not read
        assert len(Method(recipe).hooks) == 1
        return
    with pytest.raises(ValueError, match=message):
        Method(recipe)


def test_a_parameter_of_another_shape_is_refused(world, tmp_path):
    run, hooks, model = begin(world, "methods.ewc.samples=1")
    folder = keep(run, hooks, model, tmp_path)
    run = TrainingRun(dataclasses.replace(run.recipe, baseline=dataclasses.replace(run.recipe.baseline, rank=8)))
    run.load_processors()
    other = run.method.adapter.start(run.base_model(), None)
    with pytest.raises(ValueError, match=r"ewc needs parameters that keep their shape .*lora_A.*was \(16, 32\) and is"):
        run.method.hooks[1].before_stage(other, work_of(run, run.method.course.stages()[1], (folder,)))


def test_the_plan_counts_two_numbers_a_parameter(short):
    memory = {name: make_plan(short(f"method={name}"))["memory"] for name in ("seqlora", "ewc", "ewc-tir")}
    for name, content in memory.items():
        expected = 0 if name == "seqlora" else 8 * content["trainable_parameters"] / 2**30
        assert content["method_gib"] == expected
        assert content["total_gib"] == pytest.approx(memory["seqlora"]["total_gib"] + expected)


def test_a_huge_weight_keeps_the_first_tasks_answers(world, tmp_path):
    """30 steps on the second task: with it the adapter stays and the task is not learned, without it neither."""
    run, hooks, model = begin(world, "methods.ewc.weight=1e6", "adapter.lora_dropout=0")
    first, second = run.method.course.stages()
    folder = keep(run, hooks, model, tmp_path)
    start = {name: parameter.detach().clone() for name, parameter in trained(model).items()}
    asked, learned = (next(work_of(run, stage, batch_size=12).batches()) for stage in (first, second))
    answers, change, loss = {}, {}, {}
    for pulled in (None, True, False):
        hooks = Method(run.recipe).hooks[1]
        if pulled:
            hooks.before_stage(model, work_of(run, second, (folder,)))
        with torch.no_grad():
            for name, parameter in trained(model).items():
                parameter.copy_(start[name])
        optimizer = torch.optim.AdamW(trained(model).values(), lr=3e-3, weight_decay=0)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 30)
        for _ in range(0 if pulled is None else 30):
            optimizer.zero_grad()
            model(**learned).loss.backward()
            hooks.step_term(model, 1.0)
            optimizer.step()
            schedule.step()
        with torch.no_grad():
            answers[pulled] = model(**asked).logits[:, :-1].argmax(-1)[asked["labels"][:, 1:] != -100]
            loss[pulled] = float(model(**learned).loss)
            drift = [(parameter - start[name]).square().sum() for name, parameter in trained(model).items()]
        change[pulled] = float(torch.stack(drift).sum().sqrt())
    assert 0 < change[True] < 0.02 * change[False]
    assert loss[False] < 0.8 * loss[None] and loss[True] == pytest.approx(loss[None], rel=0.01)
    assert torch.equal(answers[True], answers[None]) and not torch.equal(answers[False], answers[None])


def test_without_weight_it_is_seqlora_bit_for_bit(short, tmp_path):
    runs = {"seqlora": [], "ewc": ["methods.ewc.weight=0"]}
    found = {}
    for method, overrides in runs.items():
        folder = tmp_path / method
        steps = ["training.batch_size=4", "training.per_device_batch_size=2"]
        TrainingRun(short(*steps, f"output={folder}", f"method={method}", *overrides))()
        found[method] = [load_file(folder / stage / "adapter/adapter_model.safetensors") for stage in STAGES]
        assert (folder / STAGES[0] / "kept/ewc.safetensors").exists() == (method == "ewc")
    for one, other in zip(found["seqlora"], found["ewc"], strict=True):
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
