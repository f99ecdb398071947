"""MiniCVIT: the same bytes everywhere, files that the evaluator reads, and a perfect answer that scores in full."""

import hashlib
import json
import threading
import time

import pytest
from PIL import Image

from smolora.cli import main
from smolora.data.format import read_conversations, read_questions
from smolora.evaluate.score import score
from smolora.minicvit import files as module
from smolora.minicvit import scenes
from smolora.minicvit.tasks import MINICVIT, TASKS

SMALL = 12
CAPTIONS = ("Flickr30k", "TextCaps")
DIGEST = "d4937be27bcc4a1e103b305e36374fe6eaad246c29d5f5efbab9c9e3d364b22f"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """All ten tasks with few samples each."""
    small = {name: task._replace(train=min(task.train, SMALL), test=SMALL) for name, task in TASKS.items()}
    return MINICVIT._replace(tasks=small).make(tmp_path_factory.mktemp("minicvit"))


def digest_of(folder):
    """One hash of every file's path and bytes, contact sheets excepted."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        if not name.startswith("contact_sheets/"):
            digest.update(f"{name}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def test_the_bytes_are_those_of_every_machine(folder):
    """A change of this hash is a change of the benchmark: MINICVIT's seed must change with it."""
    assert digest_of(folder) == DIGEST


@pytest.mark.parametrize("tree", MINICVIT.settings)
@pytest.mark.parametrize("name", TASKS)
def test_files_are_as_the_evaluator_reads_them(folder, tree, name):
    place = folder / tree / name
    questions = read_questions(place / TASKS[name].test_file)
    assert len(questions) == SMALL
    assert all(any(q.text.endswith(i) for i in MINICVIT.settings[tree][name]) for q in questions)
    trained = [c for file in MINICVIT.training_files(name) for c in read_conversations(place / file)]
    if name == "Places365":
        assert len(trained) == (5 + 10) * len(scenes.PLACES)
    else:
        assert len(trained) == (SMALL if TASKS[name].train else 0)
    for record in [*questions, *trained]:
        if record.image is None:
            assert name == "ScienceQA"
        else:
            with Image.open(folder / "images" / record.image) as image:
                assert (image.format, image.mode, image.size) == ("PNG", "RGB", (scenes.SIDE, scenes.SIDE))
    assert (folder / "contact_sheets" / f"{name}.png").is_file()


@pytest.mark.parametrize("protocol", ("smolora", "standard"))
@pytest.mark.parametrize("name", TASKS)
def test_a_perfect_answer_scores_in_full(folder, tmp_path, name, protocol):
    questions = read_questions(folder / "Instructions_Single" / name / TASKS[name].test_file)
    answers = tmp_path / "answers.jsonl"

    def write(texts):
        lines = [{"question_id": q.question_id, "text": text} for q, text in zip(questions, texts, strict=True)]
        answers.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return score(name, [folder / "Instructions_Single", folder / "annotations"], answers, protocol)

    first = [q.answer[0] if name in CAPTIONS else q.answer for q in questions]
    perfect = write(first)
    assert (perfect.mif, perfect.count) == (100.0, SMALL)
    if name == "Flickr30k" and protocol == "smolora":
        assert perfect.score == pytest.approx(1000)  # CIDEr's 10 for the very words of a reference
    elif name in CAPTIONS:
        assert perfect.score > 100
    else:
        assert perfect.score == 100
    wrong = write(["nothing of the kind here"] * SMALL)
    assert wrong.score < 1 and wrong.mif == 0


def test_few_shots_are_so_many_of_each_class(folder):
    place = folder / "Instructions_Single" / "Places365"
    five, ten = (read_conversations(place / f"train_{shots}shot.json") for shots in (5, 10))
    for shots, records in ((5, five), (10, ten)):
        counts = {name: sum(record.answer == name for record in records) for name in scenes.PLACES}
        assert set(counts.values()) == {shots}
    assert {record.image for record in five} < {record.image for record in ten}


@pytest.mark.parametrize("name", TASKS)
def test_answers_are_no_constant(name):
    """No single answer does for more than 55 of 100 questions."""
    given = [sample.answer for sample, _ in MINICVIT.samples(name, "balance", 300)]
    assert max(given.count(answer) for answer in set(given)) <= 165


@pytest.mark.parametrize("name", TASKS)
def test_no_picture_occurs_twice(name):
    drawn = [
        s.canvas.pixels.tobytes()
        for split in ("train", "test")
        for s, _ in MINICVIT.samples(name, split, 200)
        if s.canvas
    ]
    assert len(set(drawn)) == len(drawn)


def test_choices_stand_in_one_order_and_have_the_answer():
    """A base model of this size does not learn to look a choice up, so a question's letters always mean the same."""
    orders = {}
    for sample, _ in MINICVIT.samples("ScienceQA", "order", 300):
        letter = "ABCDE".index(sample.answer)
        lines = sample.question.split("\n")
        assert lines[1 + letter] == f"{sample.answer}. {sample.choices[letter]}"
        for choice in sample.choices:
            assert orders.setdefault(choice, sample.choices) == sample.choices


def test_what_is_there_is_kept_and_what_is_torn_is_made_again(tmp_path, monkeypatch):
    monkeypatch.setitem(TASKS, "TextVQA", TASKS["TextVQA"]._replace(train=4, test=4))
    MINICVIT.make(tmp_path, ["TextVQA"])
    whole = digest_of(tmp_path)
    stamp = (tmp_path / "images/TextVQA/test/00000.png").stat().st_mtime_ns
    MINICVIT.make(tmp_path, ["TextVQA"])
    assert (tmp_path / "images/TextVQA/test/00000.png").stat().st_mtime_ns == stamp
    (tmp_path / "annotations/TextVQA/digest.json").unlink()  # it is written last, so a killed run lacks it
    (tmp_path / "images/TextVQA/test/00000.png").write_bytes(b"torn")
    MINICVIT.make(tmp_path, ["TextVQA"])
    assert digest_of(tmp_path) == whole


def test_unknown_tasks_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"tasks must be among ScienceQA, .*got ScienceQB"):
        MINICVIT.make(tmp_path, ["ScienceQB"])


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(TASKS, "GQA", TASKS["GQA"]._replace(train=2, test=2))
    assert main(["make-minicvit", str(tmp_path), "--task", "GQA"]) == 0
    assert "GQA" in capsys.readouterr().out
    assert len(read_questions(tmp_path / "Instructions_Multi/GQA/test.json")) == 2


def test_two_that_want_it_at_once(tmp_path, monkeypatch):
    """Two runs of recipes on it: one writes, the other waits and finds it written."""
    write, wrote = module._write_task, []

    def written(benchmark, folder, name):
        wrote.append(name)
        time.sleep(0.1)
        write(benchmark, folder, name)

    monkeypatch.setattr(module, "_write_task", written)
    threads = [threading.Thread(target=MINICVIT.make, args=(tmp_path, ["Places365"])) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrote == ["Places365"] and MINICVIT.is_complete(tmp_path, "Places365")
    assert not (tmp_path / ".lock").exists()
