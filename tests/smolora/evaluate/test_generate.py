"""Answers: the same in any batch, from any number of processes, after any kill; and what is refused."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import threading
import time
from dataclasses import replace

import pytest
import torch
from accelerate import PartialState
from PIL import Image
from tqdm import tqdm

import small_llava
from smolora.backbones.llava import Llava
from smolora.data.format import read_answers
from smolora.data.prompts import PromptEncoder
from smolora.evaluate.generate import AnswerJob, GenerationSettings, answer_id, generate_answers, plan_batches
from smolora.evaluate.score import score, skipped_path
from smolora.io.files import locked
from support.answers import BATCHED, info, read

# ---- the same answers


def test_batched_equals_one_by_one_token_for_token(generate, questions, whole):
    batched = whole
    one_by_one = generate(questions, "one.jsonl", GenerationSettings(max_new_tokens=5, token_budget=1))
    assert batched.read_bytes() == one_by_one.read_bytes()
    texts = [line["text"] for line in read(batched)]
    assert len(set(texts)) > 5 and all(texts)  # they tell questions apart
    for layer, alone in zip(info(batched)["routing"], info(one_by_one)["routing"], strict=True):
        assert (layer["vu"], layer["if"]) == (alone["vu"], alone["if"])
        assert layer["alpha"] == pytest.approx(alone["alpha"], abs=1e-5)


def test_answers_are_those_of_generate_alone(whole, questions, model, backbone):
    """Against a hand-written loop without padding, sorting or workers."""
    records = json.loads(questions.read_text())
    for record, line in zip(records, read(whole), strict=True):
        image = questions.parent / record["image"] if "image" in record else None
        ids = backbone.encoder.expand(backbone.encoder.prompt(record["text"], image is not None))
        pixels = {} if image is None else {"pixel_values": backbone.transform(image)[None]}
        with torch.no_grad():
            sequence = model.generate(
                input_ids=torch.tensor([ids]),
                attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
                **pixels,
                instruction_embeds=small_llava.embed_questions([record["text"]]),
                do_sample=False,
                max_new_tokens=5,
                eos_token_id=2,
                pad_token_id=0,
            )[0, len(ids) :].tolist()
        if 2 in sequence:
            sequence = sequence[: sequence.index(2)]
        assert line["text"] == " ".join(map(str, sequence))


def test_image_workers_change_nothing(generate, questions, whole):
    workers = GenerationSettings(max_new_tokens=5, token_budget=200, image_workers=2)
    assert generate(questions, settings=workers).read_bytes() == whole.read_bytes()


def test_without_adapter(generate, questions):
    base = small_llava.small_llava()
    output = generate(questions, model=base, embed=None)
    assert info(output)["routing"] == [] and len(read(output)) == 12


def test_instruction_changes_answers(generate, questions, whole):
    other = generate(questions, "other.jsonl", embed=lambda texts: -small_llava.embed_questions(texts))
    assert read(whole) != read(other)


# ---- the file


def test_lines_are_the_released_ones(questions, whole):
    records, lines = json.loads(questions.read_text()), read(whole)
    assert [line["question_id"] for line in lines] == [record["question_id"] for record in records]
    keys = ["question_id", "prompt", "text", "answer_id", "model_id", "metadata"]
    assert all(list(line) == keys for line in lines)
    assert lines[0]["prompt"] == records[0]["text"] and lines[0]["model_id"] == "small"
    assert lines[0]["answer_id"] == answer_id(0, "small") and lines[0]["metadata"] == {}
    assert len({line["answer_id"] for line in lines}) == len(lines)
    assert answer_id(0, "small") != answer_id("0", "small") != answer_id(0, "other")


def test_scienceqa_prompts_show_the_image(generate, questions):
    lines = read(generate(questions, dataset="ScienceQA"))
    assert lines[0]["prompt"].startswith("<image>\n") and not lines[-1]["prompt"].startswith("<image>")


def test_scores_of_what_was_generated(questions, whole):
    result = score("VQAv2", [questions.parent], whole)
    assert result.count == 12 and 0 <= result.score <= 100


def test_routing_is_saved(generate, questions, model):
    each = generate(questions, settings=GenerationSettings(max_new_tokens=2, token_budget=200, routes_per_sample=True))
    layers = info(each)["routing"]
    assert len(layers) == 2 + 2 * 3  # projector and FFNs, in the model's order
    assert [layer["layer"].split(".")[1] for layer in layers[:3]] == ["multi_modal_projector"] * 2 + ["language_model"]
    assert [layer["samples"] for layer in layers] == [9] * 2 + [12] * 6  # three questions have no image
    for layer in layers:
        assert sum(layer["vu"]) == sum(layer["if"]) == layer["samples"] and len(layer["vu"]) == 3
        assert layer["alpha"] + layer["beta"] == pytest.approx(1) and 0 < layer["alpha"] < 1
    assert any(sum(count > 0 for count in layer["if"]) > 1 for layer in layers)  # instructions route apart
    samples = read(each.with_suffix(".routes.jsonl"))
    assert [len(sample["layers"]) for sample in samples] == [8] * 9 + [6] * 3
    first = [sample["layers"][-1] for sample in samples]
    assert [sum(entry["vu"] == [e] for entry in first) for e in range(3)] == layers[-1]["vu"]
    assert sum(entry["alpha"] for entry in first) / 12 == pytest.approx(layers[-1]["alpha"])


def test_progress(generate, questions, capsys, monkeypatch):
    """On a terminal: samples done of how many, samples a second, and the time left."""
    monkeypatch.setattr("smolora.io.progress.shows_bars", lambda: True)
    generate(questions)
    shown = capsys.readouterr().err.replace("\r", "\n").splitlines()
    last = [line for line in shown if line.startswith("answering VQAv2: ")][-1]
    assert re.search(r"12/12 \[\d+:\d+<\d+:\d+, .*question", last), last


# ---- interrupted


def forked(task):
    """Run `task` in a forked process with an accelerate state of its own; returns its id."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            PartialState._reset_state()
            tqdm.set_lock(threading.RLock())  # its own, or it may die with the one that this process goes on with
            task()
            status = 0
        finally:
            os._exit(status)
    return child


def lines_of(folder):
    return sum(path.read_bytes().count(b"\n") for path in folder.glob("*.jsonl")) if folder.exists() else 0


def test_killed_again_and_again(whole, generate, questions, tmp_path):
    """SIGKILL after ever more batches, with a torn last line each time: the same bytes in the end."""
    batches = len(plan_batches([60] * 12, 200))
    parts = tmp_path / "answers.jsonl.parts"
    killed = 0
    for wanted in (2, 3, 4):  # a line says what the run is, the others are a batch each
        child = forked(lambda: generate(questions))
        deadline = time.monotonic() + 60
        while lines_of(parts) < wanted and time.monotonic() < deadline:
            time.sleep(0.001)
        os.kill(child, signal.SIGKILL)
        killed += os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        assert wanted <= lines_of(parts)
        with (parts / "process-0.jsonl").open("ab") as file:
            file.write(b'{"batch": 99, "answ')
    assert killed == 3 and batches == 4
    before = lines_of(parts)
    output = generate(questions)
    assert output.read_bytes() == whole.read_bytes()
    assert info(output) == info(whole)
    assert not parts.exists() and before > 3


def test_a_finished_run_is_not_done_again(model, questions, whole, backbone, count_batches):
    before, calls = whole.stat().st_mtime_ns, count_batches()
    job = AnswerJob("VQAv2", questions, questions.parent, whole, "small")
    found = generate_answers(model, backbone, job, embed=small_llava.embed_questions, settings=BATCHED)
    assert found == info(whole) and whole.stat().st_mtime_ns == before and not calls


def test_a_finished_run_needs_no_lock(model, questions, whole, backbone):
    """It is read, also where nothing may be written."""
    job = AnswerJob("VQAv2", questions, questions.parent, whole, "small")
    with locked(whole.with_name(whole.name + ".lock"), "whole"):
        found = generate_answers(model, backbone, job, embed=small_llava.embed_questions, settings=BATCHED)
    assert found == info(whole)


def test_the_lock_of_a_run_that_was_killed_at_its_end_is_removed(model, questions, whole, backbone):
    lock = whole.with_name(whole.name + ".lock")
    lock.write_text("process 1 on nowhere\n")
    job = AnswerJob("VQAv2", questions, questions.parent, whole, "small")
    found = generate_answers(model, backbone, job, embed=small_llava.embed_questions, settings=BATCHED)
    assert found == info(whole) and not lock.exists()


def test_other_weights_under_the_same_name_are_another_run(questions, whole, backbone):
    job = AnswerJob("VQAv2", questions, questions.parent, whole, "small")
    other = small_llava.small_adapter(small_llava.small_llava(), seed=2)
    with pytest.raises(ValueError, match=r"belongs to another run .weights"):
        generate_answers(other, backbone, job, embed=small_llava.embed_questions, settings=BATCHED)


def test_another_plan_is_not_continued(generate, broken, count_batches):
    """An image that was missing is there when the run goes on: the batches are others."""
    repair(broken, 1)
    settings = replace(BATCHED, token_budget=60, skip_broken=True)
    count_batches(limit=3)
    with pytest.raises(RuntimeError, match="stopped"):
        generate(broken, settings=settings)
    image = broken.parent / json.loads(broken.read_text())[1]["image"]
    Image.new("RGB", (20, 20)).save(image)
    with pytest.raises(ValueError, match=r"answers\.jsonl\.parts belongs to another run .plan"):
        generate(broken, settings=settings)


def test_no_hook_is_left_on_the_model(model, whole):
    assert not any(getattr(module, "_forward_hooks", None) for name, module in model.named_modules() if "mlp" in name)


def test_killed_between_the_files_at_the_end(whole, generate, questions, tmp_path, monkeypatch):
    monkeypatch.setattr("smolora.evaluate.generate._answer", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # the info file is there, the answers are not
        generate(questions)
    monkeypatch.undo()
    assert (tmp_path / "answers.info.json").exists() and not (tmp_path / "answers.jsonl").exists()
    assert generate(questions).read_bytes() == whole.read_bytes()


# ---- two starts


def test_a_second_start_is_refused(whole, generate, questions, model, monkeypatch):
    """While the first is at its second batch, it is started again: the finished file is the first one's, whole."""
    forward, calls = model.generate, []

    def answered(**inputs):
        calls.append(None)
        if len(calls) == 2:
            with pytest.raises(
                BlockingIOError, match=r"answers\.jsonl is in use by process \d+ on .*: wait for its end"
            ):
                generate(questions)
        return forward(**inputs)

    monkeypatch.setattr(model, "generate", answered, raising=False)
    output = generate(questions)
    assert output.read_bytes() == whole.read_bytes() and info(output) == info(whole)
    assert {path.name for path in output.parent.iterdir()} == {"answers.jsonl", "answers.info.json"}


def test_a_second_process_is_refused(whole, generate, questions, tmp_path):
    """A job that was queued again while the first one runs."""
    with locked(tmp_path / "answers.jsonl.lock", "answers.jsonl"):
        child = forked(lambda: generate(questions))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
    assert not (tmp_path / "answers.jsonl").exists()
    assert generate(questions).read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("lost", ["all of it", "a batch"])
def test_nothing_is_merged_unless_every_batch_is_in(whole, generate, questions, model, tmp_path, monkeypatch, lost):
    forward, calls = model.generate, []
    parts = tmp_path / "answers.jsonl.parts"

    def answered(**inputs):
        calls.append(None)
        if len(calls) == 4:  # three are written
            lines = (parts / "process-0.jsonl").read_bytes().splitlines(keepends=True)
            shutil.rmtree(parts)
            if lost == "a batch":
                parts.mkdir()
                (parts / "process-0.jsonl").write_bytes(b"".join(lines[:-1]))
        return forward(**inputs)

    monkeypatch.setattr(model, "generate", answered, raising=False)
    with pytest.raises(ValueError, match=r"parts lacks \d of 5 batches, the first is \d"):
        generate(questions)
    assert not (tmp_path / "answers.jsonl").exists()
    monkeypatch.undo()
    assert generate(questions).read_bytes() == whole.read_bytes()


@pytest.mark.parametrize(
    ("model_id", "settings", "match"),
    [
        ("other", BATCHED, "model_id 'small', now 'other'"),
        ("small", GenerationSettings(max_new_tokens=6, token_budget=200), "max_new_tokens 5, now 6"),
    ],
)
def test_another_run_is_not_continued(model, backbone, questions, whole, model_id, settings, match):
    job = AnswerJob("VQAv2", questions, questions.parent, whole, model_id)
    with pytest.raises(ValueError, match=rf"whole\.jsonl belongs to another run .*{match}"):
        generate_answers(model, backbone, job, embed=small_llava.embed_questions, settings=settings)


@pytest.fixture
def two_ranks(monkeypatch):
    """Runs `task(rank)` in two gloo processes; returns their exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))

    def rank(number, task):
        os.environ.update(RANK=str(number), LOCAL_RANK=str(number), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
        task(number)

    def run(task):
        children = [forked(lambda number=number: rank(number, task)) for number in range(2)]
        return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]

    return run


def test_two_processes(whole, generate, questions, tmp_path, two_ranks, count_batches):
    """Two gloo ranks write one file, equal to one process's."""

    def task(number):
        calls = count_batches()
        generate(questions)
        (tmp_path / f"rank-{number}").write_text(str(len(calls)))

    assert two_ranks(task) == [0, 0]
    output = tmp_path / "answers.jsonl"
    assert output.read_bytes() == whole.read_bytes() and info(output) == info(whole)
    assert [(tmp_path / f"rank-{number}").read_text() for number in range(2)] == ["3", "2"]  # batches of each


def test_one_process_ends_what_two_began(whole, generate, questions, tmp_path, two_ranks, count_batches):
    def task(number):
        count_batches(limit=2)
        generate(questions)

    assert two_ranks(task) == [1, 1]
    assert len(list((tmp_path / "answers.jsonl.parts").iterdir())) == 2  # a batch each
    calls = count_batches()
    assert generate(questions).read_bytes() == whole.read_bytes() and len(calls) == 3


# ---- broken input


@pytest.fixture
def broken(tmp_path):
    """Six questions: 1 has no image file, 2 half an image, 3 another's id, 4 no text."""
    path = small_llava.write_questions(tmp_path / "broken", 6)
    records = json.loads(path.read_text())
    (path.parent / records[1]["image"]).unlink()
    image = path.parent / records[2]["image"]
    Image.new("RGB", (64, 64)).save(image)
    image.write_bytes(image.read_bytes()[:60])
    records[3]["question_id"] = 0
    del records[4]["text"]
    path.write_text(json.dumps(records))
    return path


def repair(path, *indices):
    """The test file with only these records broken."""
    records = json.loads(path.read_text())
    if 3 not in indices:
        records[3]["question_id"] = 3
    if 4 not in indices:
        records[4]["text"] = "what?"
    for index in {1, 2} - set(indices):
        del records[index]["image"]
    path.write_text(json.dumps(records))


@pytest.mark.parametrize(
    ("index", "match"),
    [
        (1, r"val\.json: record 1: there is no image .*images/1\.png"),
        (2, r"val\.json: record 2: cannot decode .*images/2\.png|val\.json: record 2: .*no image that Pillow knows"),
        (3, r"val\.json: record 3: question_id 0 is that of record 0 too"),
        (4, r"val\.json: record 4: text must be a string, got None"),
    ],
)
def test_broken_records_are_named(generate, broken, index, match):
    repair(broken, index)
    with pytest.raises(ValueError, match=match):
        generate(broken)


def test_skip_broken_counts_and_lists(generate, broken):
    settings = GenerationSettings(max_new_tokens=5, token_budget=200, image_workers=0, skip_broken=True)
    output = generate(broken, settings=settings)
    assert [answer.question_id for answer in read_answers(output)] == [0, 5]
    skipped = read(skipped_path(output))
    assert [(record["index"], record["question_id"]) for record in skipped] == [(1, 1), (2, 2), (3, None), (4, 4)]
    assert all(f"record {record['index']}" in record["reason"] for record in skipped)
    assert info(output)["skipped"] == 4 and info(output)["count"] == 2
    result = score("VQAv2", [broken.parent], output)
    assert (result.count, result.skipped) == (2, 4)
    # the answers that are there are those of a file without the broken ones
    whole = [r for r in json.loads(broken.read_text()) if r["question_id"] in (0, 5) and r.get("text")]
    clean = broken.with_name("clean.json")
    clean.write_text(json.dumps([whole[0], whole[-1]]))
    assert [line["text"] for line in read(generate(clean, "clean.jsonl"))] == [line["text"] for line in read(output)]


BROKEN = [
    {"text": ""},
    {"text": " \n"},
    {"text": "<image>"},
    {"text": "half \ud83d"},
    {"answer": "\ud83d"},
    {"image": "images/\ud83d.png"},
    {"image": "data:image/png;base64," + "A" * 9000},
    {"image": "a\0b"},
    {"image": ["images/0.png", 3]},
]


@pytest.mark.parametrize("change", BROKEN, ids=lambda change: repr(change)[:30])
def test_what_people_have_in_a_record_is_named_before_anything_is_asked_or_listed(
    generate, broken, change, count_batches
):
    repair(broken)
    records = json.loads(broken.read_text())
    records[2].update({"image": records[0]["image"], **change})
    broken.write_text(json.dumps(records))
    calls = count_batches()
    with pytest.raises(ValueError, match=r"val\.json: record 2: .{1,600}$"):
        generate(broken)
    assert not calls
    output = generate(broken, settings=replace(BATCHED, skip_broken=True))
    assert [record["index"] for record in read(skipped_path(output))] == [2] and len(read(output)) == 5
    assert score("VQAv2", [broken.parent], output).skipped == 1


def test_a_text_that_cannot_be_tokenised_is_named_or_listed(model, backbone, broken, tmp_path):
    """An image token that its tokenizer does not mark as special."""
    tokenizer = small_llava.small_tokenizer()
    tokenizer.add_tokens(["<picture>"])
    other = Llava(PromptEncoder(tokenizer, tokenizer.convert_tokens_to_ids("<picture>"), 4), backbone.transform)
    repair(broken)
    records = [{**record, "image": None} for record in json.loads(broken.read_text())]
    records[3]["text"] = "Is it <picture>?"
    broken.write_text(json.dumps(records))
    job = AnswerJob("VQAv2", broken, broken.parent, tmp_path / "a.jsonl", "m")
    with pytest.raises(ValueError, match=r"record 3: a text must not hold '<picture>'"):
        generate_answers(model, other, job, embed=small_llava.embed_questions, settings=BATCHED)
    settings = replace(BATCHED, skip_broken=True)
    found = generate_answers(model, other, job, embed=small_llava.embed_questions, settings=settings)
    assert (found["count"], found["skipped"]) == (5, 1)


def test_placeholders_in_questions_are_answered_as_text(generate, questions):
    """With a picture and without; at the head of a question with a picture it is the picture's place."""
    records = json.loads(questions.read_text())[-4:]  # three without an image
    records[0]["text"] = f"<image>\n{records[0]['text']}"
    records[1]["text"] = "Is it <image> or </s>?\nAnswer"
    path = questions.parent / "tags.json"
    path.write_text(json.dumps(records))
    lines = read(generate(path))
    assert lines[0]["prompt"] == json.loads(questions.read_text())[-4]["text"] and "<image>" in lines[1]["prompt"]
    assert len(lines) == 4


def test_what_an_earlier_run_skipped_is_not_left_out(generate, broken):
    """Its answers were removed, the data repaired: all of it is asked and scored."""
    repair(broken, 1)
    settings = replace(BATCHED, skip_broken=True, routes_per_sample=True)
    output = generate(broken, settings=settings)
    assert skipped_path(output).exists() and score("VQAv2", [broken.parent], output).skipped == 1
    output.unlink()
    Image.new("RGB", (20, 20)).save(broken.parent / json.loads(broken.read_text())[1]["image"])
    output = generate(broken)
    result = score("VQAv2", [broken.parent], output)
    assert (result.count, result.skipped) == (6, 0)
    assert not skipped_path(output).exists() and not output.with_suffix(".routes.jsonl").exists()


# ---- batches


def test_plan():
    lengths = [3, 9, 4, 9, 1, 5]
    plan = plan_batches(lengths, 18)
    assert plan == [[1, 3], [5, 2, 0], [4]]
    assert plan_batches(lengths, 1) == [[1], [3], [5], [2], [0], [4]]  # longer than the budget: alone
    assert plan_batches([], 10) == []


@pytest.mark.parametrize("budget", [1, 7, 50, 10**6])
def test_plan_keeps_to_the_budget(budget):
    lengths = torch.randint(1, 40, (200,), generator=torch.Generator().manual_seed(0)).tolist()
    plan = plan_batches(lengths, budget)
    assert sorted(position for batch in plan for position in batch) == list(range(200))
    for batch in plan:
        assert len(batch) == 1 or len(batch) * max(lengths[p] for p in batch) <= budget


@pytest.mark.parametrize("name", ["max_new_tokens", "token_budget", "image_workers"])
@pytest.mark.parametrize("value", [-1, 1.5, True, "8"])
def test_settings_are_checked(name, value):
    with pytest.raises(ValueError, match=f"{name} must be an integer of at least"):
        GenerationSettings(**{name: value})


def test_leftovers_of_a_broken_disk_are_not_read(generate, questions, tmp_path):
    """A part file that is empty or torn at its first line is as good as none."""
    parts = tmp_path / "answers.jsonl.parts"
    parts.mkdir()
    (parts / "process-0.jsonl").write_bytes(b'{"run": {"data')
    output = generate(questions)
    assert len(read(output)) == 12
