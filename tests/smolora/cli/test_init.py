"""`smolora init`: files in other formats become a recipe that plans at once."""

from __future__ import annotations

import csv
import json
import sys

import pytest

from small_llava import save_base, small_llava
from smolora.cli import main
from smolora.data.format import read_conversations, read_questions
from smolora.recipe import load_recipe
from support.train_world import WORD, draw

COLOURS = ("red", "green", "blue", "white")
QUICK = (
    "model.dtype=float32",
    "training.batch_size=10",
    "training.per_device_batch_size=10",
    "training.workers=0",
    "evaluation.workers=0",
    "evaluation.max_new_tokens=2",
    "adapter={r: 2, lora_alpha: 4, num_vu_experts: 2, num_if_experts: 2}",
)


def pictures(folder, count):
    (folder / "images").mkdir(parents=True)
    for index in range(count):
        draw(folder / "images" / f"{index}.png", COLOURS[index % 4], index)


def three_files(folder):
    """LLaVA's JSON, JSON lines with messages, and CSV, on 12 pictures."""
    pictures(folder, 12)
    llava = [
        {
            "image": f"images/{index}.png",
            "conversations": [
                {"from": "human", "value": f"<image>\nWhich colour?\n{WORD}"},
                {"from": "gpt", "value": COLOURS[index % 4]},
            ],
        }
        for index in range(12)
    ]
    (folder / "colour.json").write_text(json.dumps(llava))
    messages = [
        {
            "images": [f"images/{index}.png"],
            "messages": [
                {"role": "user", "content": "What is happening?\nDescribe it in a sentence."},
                {"role": "assistant", "content": f"It is a wall that is {COLOURS[index % 4]}."},
            ],
        }
        for index in range(12)
    ]
    for name, part in (("scene_train", messages[:8]), ("scene_test", messages[8:])):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, part)))
    with (folder / "choice.csv").open("w", newline="") as file:
        rows = csv.DictWriter(file, ["img", "query", "label"])
        rows.writeheader()
        rows.writerows(
            {"img": f"{index}.png", "query": f"A. {COLOURS[index % 4]}\nB. pink\nGive the letter.", "label": "A"}
            for index in range(12)
        )
    return [str(folder / name) for name in ("colour.json", "scene_train.jsonl", "scene_test.jsonl", "choice.csv")]


def init(folder, *arguments):
    places = ["--recipe", str(folder / "mine.yaml"), "--folder", str(folder / "own"), "--model", str(folder / "base")]
    return main(["init", *places, *arguments])


def test_three_files_become_a_recipe_that_plans(tmp_path, capsys):
    assert init(tmp_path, *three_files(tmp_path)) == 0
    shown = capsys.readouterr().out
    for part in ("question     messages", "image        images", "question     query", "answer       label", "next:"):
        assert part in shown
    recipe = load_recipe(tmp_path / "mine.yaml")
    assert [(task.name, task.metric, task.format) for task in recipe.tasks] == [
        ("colour", ["exact"], "words 2"),
        ("scene", ["rougeL"], "sentence"),
        ("choice", ["letter"], "letter"),
    ]
    assert [task.instructions for task in recipe.tasks] == [
        [WORD],
        ["Describe it in a sentence."],
        ["Give the letter."],
    ]
    assert [task.images for task in recipe.tasks] == [str(tmp_path), str(tmp_path), str(tmp_path / "images")]
    colour = recipe.tasks[0]
    train, test = read_conversations(recipe.train_file(colour)), read_questions(recipe.test_file(colour))
    assert (len(train), len(test)) == (10, 2) and not {t.image for t in train} & {q.image for q in test}
    save_base(tmp_path / "base", small_llava())
    assert main(["train", str(tmp_path / "mine.yaml"), "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert [(stage["name"], stage["train"], stage["test"]) for stage in plan["stages"]] == [
        ("colour", 10, 2),
        ("scene", 8, 4),
        ("choice", 10, 2),
    ]
    look = plan["data"]["choice"]
    assert (look["pictures"], look["in_both"], look["pictures_in_both"], look["looked_at"]) == (12, 0, 0, 12)
    assert look["broken"] == [] and look["answer_words"] == [1, 1]


def several(folder):
    """ShareGPT's conversations of two turns and two pictures, and JSON lines of one question about two pictures."""
    pictures(folder, 12)
    names = [[f"images/{index}.png", f"images/{(index + 1) % 12}.png"] for index in range(0, 12, 2)]
    turns = [
        {
            "images": own,
            "conversations": [
                {"from": "human", "value": f"<image>\nWhich colour?\n{WORD}"},
                {"from": "gpt", "value": COLOURS[0]},
                {"from": "human", "value": f"And <image>?\n{WORD}"},
                {"from": "gpt", "value": COLOURS[1]},
            ],
        }
        for own in names
    ]
    (folder / "turns.json").write_text(json.dumps(turns))
    pairs = [{"images": own, "question": f"Which is red?\n{WORD}", "answer": "the first"} for own in names]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    return [str(folder / name) for name in ("turns.json", "pairs.jsonl")]


def test_several_images_and_turns_are_planned_as_they_are(tmp_path, capsys):
    assert init(tmp_path, *several(tmp_path)) == 0
    shown = capsys.readouterr().out
    assert "turns: 5 to train with, 1 to test with, up to 2 images and 2 questions each; metric exact" in shown
    assert "pairs: 5 to train with, 1 to test with, up to 2 images each; metric exact" in shown
    recipe = load_recipe(tmp_path / "mine.yaml")
    assert [task.instructions for task in recipe.tasks] == [[WORD], [WORD]]
    (question,) = read_questions(recipe.test_file(recipe.tasks[0]))
    assert len(question.images) == 2 and [message.role for message in question.messages] == [
        "user",
        "assistant",
        "user",
    ]
    save_base(tmp_path / "base", small_llava())
    assert main(["train", str(tmp_path / "mine.yaml"), "--dry-run", "--json"]) == 0
    look = json.loads(capsys.readouterr().out)["data"]["turns"]
    assert look["pictures"] == 12 and look["pictures_in_both"] == 0


@pytest.mark.slow
def test_several_images_and_turns_are_trained_and_asked(tmp_path):
    assert init(tmp_path, *several(tmp_path)) == 0
    save_base(tmp_path / "base", small_llava())
    assert main(["train", str(tmp_path / "mine.yaml"), f"output={tmp_path / 'run'}", *QUICK]) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert [len(row) for row in results["matrix"]] == [1, 2]


def test_a_field_that_cannot_be_told_is_named_or_asked(tmp_path, capsys, monkeypatch):
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(json.dumps({"frage": f"Q{i}", "antwort": "ja"}) for i in range(5)))
    assert init(tmp_path, str(path)) == 1
    error = capsys.readouterr().err
    assert "cannot tell which field has the question: give --question, one of frage, antwort" in error
    assert not (tmp_path / "own").exists() and not (tmp_path / "mine.yaml").exists()
    options = ["--question", "frage", "--answer", "antwort", "--image", "x"]
    assert init(tmp_path, str(path), *options) == 1
    assert "--image must be a field of the records, got 'x', which no file has" in capsys.readouterr().err
    # an option is for the files that have its field
    assert init(tmp_path, str(path), *three_files(tmp_path)[1:3], *options[:4], "--folder", str(tmp_path / "two")) == 0
    assert (tmp_path / "two" / "x").is_dir() and (tmp_path / "two" / "scene").is_dir()
    (tmp_path / "mine.yaml").unlink()
    asked = []
    answers = iter(["wrong", "frage", "antwort"])
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    monkeypatch.setattr("builtins.input", lambda text: asked.append(text) or next(answers))
    assert init(tmp_path, str(path)) == 0
    assert len(asked) == 3 and "which field has the answer? (frage, antwort)" in asked[-1]
    (sample, *_) = read_conversations(tmp_path / "own" / "x" / "train.json")
    assert sample.answer == "ja" and sample.text.startswith("Q")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.json"], "there is no file or folder nowhere.json"),
        (["{}/colour.json", "--test-fraction", "1"], "--test-fraction must lie between 0 and 1, got 1"),
        (["{}/scene_test.jsonl"], "scene has a test file, {}/scene_test.jsonl, and nothing to train with"),
        (["{}/colour.json", "{}/colour_train.json"], "are both for train of the task colour"),
        (["{}/colour.json", "--images", "{}/images"], "image 'images/0.png' is in none of {}/images"),
        (["{}/colour.json", "--recipe", "{}/colour.json"], "--recipe {}/colour.json is there already"),
    ],
)
def test_what_does_not_fit_is_named_before_anything_is_written(tmp_path, capsys, arguments, message):
    three_files(tmp_path)
    (tmp_path / "colour_train.json").write_bytes((tmp_path / "colour.json").read_bytes())
    assert init(tmp_path, *(argument.format(tmp_path) for argument in arguments)) == 1
    assert message.format(tmp_path) in capsys.readouterr().err
    assert not (tmp_path / "own").exists()


def test_pictures_in_a_parquet_file_are_written(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    pictures(tmp_path, 4)
    contents = [(tmp_path / "images" / f"{index}.png").read_bytes() for index in range(4)]
    records = [
        {"image": {"bytes": content, "path": None}, "question": "Which colour?", "answers": ["red", "Red"]}
        for content in contents
    ]
    (tmp_path / "set").mkdir()
    parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "set" / "train-00000-of-00001.parquet")
    assert init(tmp_path, str(tmp_path / "set")) == 0
    recipe = load_recipe(tmp_path / "mine.yaml")
    (task,) = recipe.tasks
    assert (task.name, task.metric, task.images) == ("set", ["vqa"], str(tmp_path / "own" / "set" / "images"))
    (question,) = read_questions(recipe.test_file(task))
    assert question.answer == ("red", "Red") and (recipe.images(task) / question.image).read_bytes() in contents


def test_from_three_files_to_a_report(tmp_path, capsys):
    """What docs/own_tasks.md says, on tiny data; the recipe is changed on the command line alone."""
    assert init(tmp_path, *three_files(tmp_path)) == 0
    save_base(tmp_path / "base", small_llava())
    own = [f"output={tmp_path / 'run'}", "tasks.scene.metric=[rougeL, contains]"]
    assert main(["train", str(tmp_path / "mine.yaml"), *own, *QUICK]) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert [len(row) for row in results["matrix"]] == [1, 2, 3] and None not in results["mif"][-1]
    scores = json.loads(next((tmp_path / "run").glob("stage-3*/scores.json")).read_text())
    assert scores["scene"]["metric"] == "rougeL" and "contains" in scores["scene"]
    assert main(["report", str(tmp_path / "run"), "--cases", "1", "--output", str(tmp_path / "report")]) == 0
    page = (tmp_path / "report" / "report.md").read_text()
    assert all(name in page for name in ("colour", "scene", "choice"))
    assert main(["metrics", str(tmp_path / "run" / "results.json"), "--convention", "mllm-cl"]) == 0
    assert "MFN" in capsys.readouterr().out
