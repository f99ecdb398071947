"""Recipes: what is read, changed and refused, before anything runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from smolora.recipe import load_recipe
from smolora.recipe.arguments import REFUSED_ARGUMENTS, training_argument_names

MINIMAL = {
    "name": "x",
    "model": {"path": "base"},
    "data": {"root": "data"},
    "tasks": [
        {"name": "ImageNet", "train": "ImageNet/train.json", "test": "ImageNet/test.json"},
        {"name": "GQA", "train": "GQA/train.json", "test": "GQA/test.json"},
    ],
}


@pytest.fixture
def path(tmp_path) -> Path:
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(MINIMAL))
    return file


def test_defaults_are_the_papers(path):
    recipe = load_recipe(path)
    training, adapter = recipe.training, recipe.adapter_config()
    assert (training.learning_rate, training.batch_size, training.epochs, training.schedule) == (1e-4, 64, 1, "cosine")
    assert (training.weight_decay, training.warmup_ratio) == (0.01, 0.03)
    assert (adapter.r, adapter.scaling, adapter.num_vu_experts, adapter.num_if_experts, adapter.top_k) == (
        16,
        2,
        4,
        4,
        1,
    )
    assert recipe.folder == Path("runs/x") and recipe.seed == 0 and recipe.method == "smolora"


@pytest.mark.parametrize(
    ("override", "get", "value"),
    [
        ("training.epochs=2", lambda r: r.training.epochs, 2.0),
        ("training.learning_rate=2e-5", lambda r: r.training.learning_rate, 2e-5),  # a text in YAML 1.1
        ("adapter.fusion=mean", lambda r: r.adapter_config().fusion, "mean"),  # a section that the file lacks
        ("tasks.1.test=other/test.json", lambda r: r.tasks[1].test, "other/test.json"),
        ("tasks.GQA.dataset=VQAv2", lambda r: r.tasks[1].benchmark_name, "VQAv2"),
        ("data.annotations=[a, b]", lambda r: r.data.annotations, ["a", "b"]),
        ("training.projector_learning_rate=null", lambda r: r.training.projector_learning_rate, None),
        ("training.arguments.report_to=tensorboard", lambda r: r.training.arguments, {"report_to": "tensorboard"}),
        ("output=a=b", lambda r: str(r.folder), "a=b"),
        ("downstream=null", lambda r: r.downstream, {}),  # a section whose lines are commented out
        ("tasks.0.metric=anls", lambda r: r.tasks[0].benchmark_name, "metric anls"),
        (
            "tasks.0={name: a, train: t, test: t, metric: [iou, exact], format: box}",
            lambda r: r.tasks[0].benchmark_name,
            "metric iou + exact, format box",
        ),
        ("benchmark='${x}'", lambda r: r.benchmark, "${x}"),  # a text, and nothing to be replaced in it
        ("order=[GQA, ImageNet]", lambda r: [task.name for task in r.tasks], ["GQA", "ImageNet"]),
        ("downstream.zero-shot=[{name: OCRVQA, test: t}]", lambda r: r.downstream["zero-shot"][0].test, "t"),
    ],
)
def test_overrides(path, override, get, value):
    assert get(load_recipe(path, [override])) == value


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("metod=seqlora", r"unknown key 'metod'; did you mean 'method'\?"),
        ("training.lerning_rate=1", r"unknown key 'training.lerning_rate'; did you mean 'training.learning_rate'\?"),
        ("learning_rate=1", r"unknown key 'learning_rate'; did you mean 'training.learning_rate'\?"),
        ("adapter.lora_alfa=1", r"unknown key 'adapter.lora_alfa'; did you mean 'adapter.lora_alpha'\?"),
        ("training.lr=1", r"did you mean 'training.learning_rate'\?"),
        ("adapter.dropout=0.1", r"did you mean 'adapter.lora_dropout'\?"),
        ("adapter.rank=4", r"did you mean 'adapter.r'\?"),
        ("adapter.peft_type=LORA", r"unknown key 'adapter.peft_type'; did you mean"),
        ("tasks.0.trian=x", r"unknown key 'tasks.0.trian'; did you mean 'tasks.0.train'\?"),
        ("training.arguments.max_grad_nrm=1", r"did you mean 'training.arguments.max_grad_norm'\?"),
        ("training.arguments.learning_rate=1", r"training.arguments.learning_rate is set by training.learning_rate"),
        ("tasks.7.test=x", r"tasks.7.test=x: 7 must be one of 0 to 1, ImageNet, GQA"),
        ("name.x=1", r"name.x=1: name is no section but 'x'"),
        ("justakey", r"an override must be key=value, got 'justakey'"),
        ("training.epochs=two", r"training.epochs must be a number, got 'two'"),
        ("training.epochs=.inf", r"training.epochs must be a finite number"),
        ("training.epochs=0", r"training.epochs must be positive, got 0"),
        ("tasks.0.epochs=-1", r"tasks\.0\.epochs must be positive, got -1"),
        ("training.batch_size=2.5", r"training.batch_size must be an integer, got 2.5"),
        ("training.batch_size=0", r"training.batch_size must be at least 1, got 0"),
        ("training.activation_checkpointing=1", r"training.activation_checkpointing must be true or false, got 1"),
        ("training.schedule=linear", r"training.schedule must be one of 'cosine', 'constant', got 'linear'"),
        ("name=5", r"name must be a text, got 5"),
        ("seed=true", r"seed must be an integer, got True"),
        ("training.batch_size='4'", r"training.batch_size must be an integer, got '4'"),
        ("training.epochs=true", r"training.epochs must be a number, got True"),
        ("model.dtype=null", r"model.dtype must be one of 'bfloat16', 'float16', 'float32', got None"),
        ("training=5", r"training must be a section of keys and values, got 5"),
        ("tasks={}", r"tasks must be a list, got"),
        ("tasks=[]", r"tasks must have an entry"),
        ("order=[GQA]", r"order must have each of the tasks ImageNet, GQA once, got GQA$"),
        ("order=[GQA, GQA]", r"order must have each of the tasks ImageNet, GQA once, got GQA, GQA"),
        ("order=[GQA, Image]", r"order must have each of the tasks ImageNet, GQA once, got GQA, Image"),
        ("tasks.1.name=ImageNet", r"tasks and downstream must have different names"),
        ("tasks.1.name=../x", r"a name must be letters, digits, spaces and any of ,._\+-, got '../x'"),
        ("tasks.1.train=null", r"GQA must have a training file, train"),
        ("tasks.0={name: a, train: t, test: t, metric: exact, dataset: GQA}", r"a: give dataset or metric, got both"),
        ("tasks.0.format=letter", r"ImageNet.format needs a metric, which 'ImageNet' has of its own"),
        ("tasks.0.metric=exact + anls", r"ImageNet.metric must be one metric an entry, got 'exact \+ anls'"),
        ("tasks.0.metric=3", r"tasks.0.metric must be a list, got 3"),
        ("instructions.embed=task_mean", r"task_mean needs instructions of each task, ImageNet has none"),
        ("adapter.top_k=9", r"top_k must be at most"),
        ("training.warmup_ratio=1", r"training.warmup_ratio must lie in \[0, 1\), got 1"),
        ("training.epochs=[", r"not YAML"),
        ("downstream={a: [], a: []}", r"not YAML: 'a' is given twice in the section that starts in line 1"),
        (
            "output=$HOME/runs",
            r"output: a path is taken as it is written, and no \$ is replaced in it: write out '\$HOME",
        ),
        ("tasks.0.images=${DATA}/x", r"tasks.0.images: a path is taken as it is written"),
        ("data.annotations=[a, $B]", r"data.annotations.1: a path is taken"),
        ("training.arguments.deepspeed=$ZERO", r"training.arguments: a path is taken"),
        ("data.root=~nobody-at-all/x", r"data.root: there is no home folder of '~nobody-at-all'"),
        ('tasks.0.instructions=["a\\ud800"]', r"tasks.0.instructions.0 must be a text, got .* with half a character"),
        (
            "training.arguments.label_smoothing_factor=0.1",
            r"label_smoothing_factor must be left out, got 0.1: without labels in its forward, the model would",
        ),
        (
            "training.arguments.neftune_noise_alpha=5",
            r"must be left out, got 5: the model would route by noise, which it does not have",
        ),
        ("training.arguments.save_only_model=true", r"got True: a run that was stopped and continued would differ"),
        ("training.arguments.ignore_data_skip=true", r"got True: a run that was stopped and continued would differ"),
        (
            "training.arguments.dataloader_in_order=false",
            r"got False: a run that was stopped and continued would differ",
        ),
        ("training.arguments.resume_from_checkpoint=x", r"a run finds its checkpoints by itself"),
        (
            "training.arguments.auto_find_batch_size=true",
            r"training.batch_size alone decides how many samples",
        ),
        ("training.arguments.accelerator_config={split_batches: true}", r"alone decides how many samples a step has"),
        ("training.arguments.average_tokens_across_devices=false", r"the loss would depend on the number of devices"),
        ("training.arguments.dataloader_drop_last=true", r"a stage trains on all of its samples"),
        ("training.arguments.eval_strategy=steps", r"a stage is evaluated after its training"),
        ("training.arguments.load_best_model_at_end=true", r"a stage is evaluated after its training"),
        ("training.arguments.train_sampling_strategy=random", r"is set by the trainer"),
    ],
)
def test_refused(path, override, message):
    with pytest.raises(ValueError, match=message):
        load_recipe(path, [override])


def test_missing_key_is_named(path):
    content = {**MINIMAL, "tasks": [{"name": "ImageNet", "train": "t"}]}
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match=r"recipe.yaml: tasks.0.test is missing"):
        load_recipe(path)


def test_extends(path):
    child = path.with_name("child.yaml")
    child.write_text(
        "extends: recipe.yaml\nname: y\nmodel: {dtype: float32}\ntasks: [{name: GQA, train: a, test: b}]\n"
    )
    recipe = load_recipe(child)
    assert recipe.name == "y" and recipe.model.path == "base" and recipe.model.dtype == "float32"
    assert [task.name for task in recipe.tasks] == ["GQA"]
    path.write_text("extends: child.yaml\n")
    with pytest.raises(ValueError, match="which extends it"):
        load_recipe(child)


def test_an_argument_at_its_default_is_no_change(path):
    arguments = {"label_smoothing_factor": 0, "save_only_model": False, "accelerator_config": None}
    overrides = [f"training.arguments.{name}={'null' if value is None else value}" for name, value in arguments.items()]
    assert load_recipe(path, overrides).training.arguments == arguments


def test_every_refused_argument_is_one():
    """A name that transformers no longer has would refuse nothing."""
    assert REFUSED_ARGUMENTS.keys() <= training_argument_names()


PATHS = {
    "output": "x",
    "model.path": "x",
    "data.root": "x",
    "data.images": "x",
    "data.annotations": ["x", "y"],
    "instructions.encoder": "x",
    "tasks.0.train": "x",
    "tasks.1.test": "x",
    "tasks.1.images": "x",
    "downstream.few-shot": [{"name": "OCRVQA", "test": "t", "train": "u", "images": "i"}],
    "training.arguments.deepspeed": "x",
    "training.arguments.fsdp_config": "x",
}


@pytest.mark.parametrize("key", PATHS)
def test_home_in_any_path(path, monkeypatch, key):
    monkeypatch.setenv("HOME", "/home/somebody")

    def under(folder, value):
        if isinstance(value, str):
            return f"{folder}/{value}"
        return (
            [under(folder, v) for v in value]
            if isinstance(value, list)
            else {k: v if k == "name" else under(folder, v) for k, v in value.items()}
        )

    written, meant = under("~", PATHS[key]), under("/home/somebody", PATHS[key])
    found, expected = (load_recipe(path, [f"{key}={json.dumps(value)}"]) for value in (written, meant))
    assert found == expected and "~" not in str(found)


def test_home_of_a_recipe_that_is_extended(path, monkeypatch):
    monkeypatch.setenv("HOME", str(path.parent))
    child = path.parent / "folder/child.yaml"
    child.parent.mkdir()
    child.write_text("extends: ~/recipe.yaml\nname: y\n")
    assert load_recipe(child).model.path == "base"
    child.write_text("extends: $HOME/recipe.yaml\n")
    with pytest.raises(ValueError, match=r"no \$ is replaced"):
        load_recipe(child)


def test_keys_given_twice_are_named(path):
    path.write_text(path.read_text() + "seed: 1\ntraining:\n  epochs: 1\n  batch_size: 4\n  epochs: 2\n")
    with pytest.raises(ValueError, match=r"recipe.yaml: not YAML: 'epochs' is given twice in the section .* line \d+"):
        load_recipe(path)
    path.write_text(yaml.safe_dump(MINIMAL) + "name: y\n")
    with pytest.raises(ValueError, match=r"'name' is given twice in the section that starts in line 1"):
        load_recipe(path)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "latin-1"])
def test_encodings(path, encoding):
    content = yaml.safe_dump({**MINIMAL, "benchmark": "Größe"}, allow_unicode=True)
    path.write_bytes(content.encode(encoding))
    if encoding.startswith("utf-8"):
        assert load_recipe(path).benchmark == "Größe"
    else:
        with pytest.raises(ValueError, match=r"recipe.yaml: must be UTF-8, got (UTF-16|the byte 0xf6 in line 1)"):
            load_recipe(path)


def test_a_resolved_recipe_is_a_recipe(path):
    few_shot = "downstream.few-shot=[{name: 'Places365, 5-shot', test: t, train: u}]"
    recipe = load_recipe(path, ["adapter.r=8", "order=[GQA, ImageNet]", few_shot])
    path.write_text(yaml.safe_dump(recipe.as_dict()))
    assert load_recipe(path) == recipe
