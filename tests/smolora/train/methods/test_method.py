"""A method's parts: which fit together, which options they take, and when their hooks are called."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch

from small_llava import small_llava
from smolora.cli.train import summary
from smolora.train.methods import METHODS, Hooks, Method, StageWork
from smolora.train.methods.method import ADD_ONS
from smolora.train.run import TrainingRun


def test_parts_of_a_method(short):
    joint = Method(short("method={adapter: moelora, schedule: [joint]}"))
    assert joint.name == "moelora + joint" and joint.adapter.name == "moelora"
    assert joint.course.stages() == Method(short("method=multitask")).course.stages()
    told = {name: Method(short(f"method={name}")).task_source for name in METHODS}
    assert told["dirlora"] == "given" and told["seqlora"] is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("method=smolor", r"method must be one of .*, got 'smolor'; did you mean 'smolora'\?"),
        ("method={adapter: lor}", r"method.adapter must be one of .*, got 'lor'; did you mean 'lora'\?"),
        ("method={adapter: lora, schedule: [jont]}", r"method.schedule must be one of .*'jont'; did you mean 'joint'"),
        ("method={adapter: lora, schedule: [joint, none]}", r"at most one of sequential, .*got \['joint', 'none'\]"),
        ("method={adapter: none}", r"'none' goes with the adapter 'none' .*got adapter 'none' and schedule 'seq"),
        ("method={adapter: dmole, schedule: [joint]}", r"must be 'sequential' for the adapter 'dmole', .*got 'joint'"),
        ("method={adapter: dmole, schedule: [one-per-task]}", r"method.schedule must be .*got 'one-per-task'"),
        ("method={adapter: lora, schedule: [none]}", r"got adapter 'lora' and schedule 'none'"),
        ("methods={lor: {a: 1}}", r"methods must be one of .*, got 'lor'; did you mean 'lora'\?"),
        ("methods={smolora: {a: 1}}", r"methods.smolora must be left out: smolora has no options, got \{'a': 1\}"),
    ],
)
def test_parts_that_do_not_fit(short, override, message):
    with pytest.raises(ValueError, match=message):
        Method(short(override))


@pytest.mark.parametrize("sharded", ["fsdp=true", "deepspeed={zero_optimization: {stage: 3}}"])
def test_passes_between_stages_are_refused_with_sharded_parameters(short, sharded):
    sharded = f"training.arguments.{sharded}"
    name = sharded.partition("=")[0]
    for method in ("branchlora", "lilora", "moecl", "dmole"):
        with pytest.raises(ValueError, match=rf"{name} must be left out for the adapter '{method}', whose passes over"):
            Method(short(f"method={method}", sharded))
    Method(short("method=branchlora", "methods.branchlora={freeze: false, routers: shared}", sharded))
    Method(short("method=lilora", "methods.lilora.task=oracle", sharded))
    Method(short("method=smolora", sharded))
    Method(short("method=branchlora", "training.arguments.fsdp=false", "training.arguments.deepspeed=null"))


@pytest.mark.parametrize("method", ["moecl", "dmole"])
def test_modules_of_their_own(short, method):
    """Methods with targets of their own leave out what all methods do, and refuse targets that they would not use."""
    base = small_llava()
    excluded = r"adapter.exclude_modules=.*layers\.0\..*"
    found = []
    for overrides in ([], [excluded]):
        adapter = Method(short(f"method={method}", *overrides)).adapter
        found.append(set(adapter.start(small_llava(), None).targeted_module_names))
    assert found[1] == {name for name in found[0] if "layers.0." not in name} and found[0] > found[1] > set()
    given = "adapter.target_modules=.*q_proj"
    with pytest.raises(
        ValueError, match=rf"methods\.{method}\.target_modules must be given where adapter\.target_modul"
    ):
        Method(short(f"method={method}", given))
    adapter = Method(short(f"method={method}", given, f"methods.{method}.target_modules=.*x")).adapter
    assert adapter.targets(base) == ".*x"


@pytest.mark.parametrize(
    ("method", "used"),
    [
        ("dmole", {"budget": 0.5, "router_epochs": 7}),
        ("lilora", {"task": "selector", "task_r": 8}),
        ("moecl", {"double_softmax": True}),
        ("branchlora", {"branches": 4, "freeze": 2}),
    ],
)
def test_options_as_they_are_used(short, method, used):
    recipe = short(f"method={method}", "methods.dmole.router_epochs=7", "methods.lora={}")
    options = Method(recipe).adapter.settings()["methods"]
    assert options.keys() == {method} and options[method] == {**options[method], **used}
    assert "methods" not in Method(short("method=moelora")).adapter.settings()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("method=3", "method must be a text, got 3"),
        ("method={adapter: 3}", "method.adapter must be a text, got 3"),
        ("method={adaptor: lora}", r"unknown key 'method.adaptor'; did you mean 'method.adapter'\?"),
        ("method={schedule: [joint]}", "method.adapter is missing"),
        ("methods=[]", r"methods must be a section of keys and values, got \[\]"),
    ],
)
def test_what_a_recipe_refuses(short, override, message):
    with pytest.raises(ValueError, match=message):
        short(override)


class Recorded(Hooks):
    """Notes every call, and takes all gradients away."""

    calls: list[tuple] = []  # noqa: RUF012

    def freeze(self, model, stage):
        self.calls.append(("freeze", stage.number))

    def before_stage(self, model, work):
        batches = list(work.batches())
        self.calls.append(("before", len(work), [len(batch["input_ids"]) for batch in batches]))
        chosen = next(iter(work.batches([11, 0])))
        assert torch.equal(chosen["pixel_values"][1], batches[0]["pixel_values"][0])
        assert torch.equal(work.total(torch.ones(2)), torch.ones(2))

    def step_term(self, model, scale):
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        self.calls.append(("step", scale, bool(gradients) and any(bool(g.any()) for g in gradients)))
        for gradient in gradients:
            gradient.zero_()

    def after_stage(self, model, work, folder):
        changed = [name for name, p in model.named_parameters() if name.endswith("lora_B.default.weight") and p.any()]
        self.calls.append(("after", changed, sorted(folder.iterdir())))
        with torch.no_grad():
            next(p for name, p in model.named_parameters() if "lora_B" in name).fill_(7.0)
        (folder / "note.json").write_text("{}")


@pytest.fixture
def recorded(monkeypatch):
    """A method whose add-on notes what is called."""
    monkeypatch.setitem(ADD_ONS, "recorded", Recorded)
    monkeypatch.setattr(Recorded, "calls", [])
    return Recorded.calls


def test_hooks_are_called_in_turn(short, recorded, tmp_path):
    """12 samples, 4 a step in two micro-batches of 2: three terms once a step, before the gradients are used."""
    recipe = short(
        "method={adapter: lora, schedule: [recorded]}",
        "training.batch_size=4",
        "training.per_device_batch_size=2",
        "training.weight_decay=0",
    )
    TrainingRun(recipe)()
    first = recorded[: len(recorded) // 2]
    assert first == [
        ("freeze", 0),
        ("before", 12, [2] * 6),
        *[("step", 1.0, True)] * 3,
        ("after", [], []),  # without gradients, nothing was trained
    ]
    assert recorded[len(first)] == ("freeze", 1)
    assert (tmp_path / "run/stage-1-ImageNet/kept/note.json").read_text() == "{}"
    assert recorded[-1][1], "the second stage starts from what `after_stage` made of the first adapter"


def test_a_stage_that_was_changed_is_not_started_from(short, recorded, tmp_path):
    recipe = short("method={adapter: lora, schedule: [recorded]}")
    TrainingRun(recipe)()
    note = tmp_path / "run/stage-1-ImageNet/kept/note.json"
    sums = json.loads((tmp_path / "run/stage-1-ImageNet/checksums.json").read_text())
    assert {"adapter/adapter_model.safetensors", "kept/note.json"} <= sums.keys()
    (tmp_path / "run/stage-2-Flickr30k/adapter").rename(tmp_path / "aside")
    note.write_text("{ }")
    with pytest.raises(ValueError, match=rf"{note} was changed since its stage was trained"):
        TrainingRun(recipe)()
    note.unlink()
    with pytest.raises(ValueError, match=rf"{note} is missing since its stage was trained"):
        TrainingRun(recipe)()


def test_the_plan_and_the_last_line_name_the_parts(short, tmp_path, capsys):
    recipe = short("method={adapter: lora, schedule: [one-per-task]}", one_task=True)
    results = TrainingRun(recipe)()
    assert (results["method"], results["course"], results["task_source"]) == (
        "lora + one-per-task",
        "one-per-task",
        "given",
    )
    assert summary(results).startswith("small (lora + one-per-task, task given): AP ")


def test_what_is_found_once(tmp_path):
    """A stage that starts again finds it anew, one that goes on from a checkpoint reads it."""
    process = SimpleNamespace(is_main_process=True)
    found = iter([{"a": 1.1}, {"a": 2.2}])
    stage = StageWork(None, (), [], None, 1, process, tmp_path / "notes")
    assert stage.once("scores", lambda: next(found)) == {"a": 1.1}
    assert stage.once("scores", lambda: next(found)) == {"a": 2.2}
    going_on = dataclasses.replace(stage, goes_on=True)
    assert going_on.once("scores", lambda: pytest.fail("found again")) == {"a": 2.2}
    assert going_on.once("other", lambda: -1) == -1 == going_on.once("other", lambda: 0)
    assert dataclasses.replace(going_on, notes=None).once("other", lambda: 3) == 3
