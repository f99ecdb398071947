"""MiniCoIN: the same bytes everywhere, CoIN's files, boxes that fit what is drawn, and perfect answers that score."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil

from smolora.cli import main
from smolora.data.format import read_conversations, read_questions
from smolora.data.images import ImageTransform
from smolora.evaluate.coin import COIN_DATASETS
from smolora.evaluate.grounding import written_box
from smolora.evaluate.score import score
from smolora.minicvit.drawing import png
from smolora.minicvit.minicoin import CORNERS, MINICOIN, NUMBERS, SIZES, padded, scene, scene_picture
from smolora.minicvit.pictures import EVERYWHERE, PATCH, PATCHES
from smolora.minicvit.scenes import COLOURS, SIDE, StableRandom

from .test_tasks import digest_of

SMALL = 12
DIGEST = "c6408865eada8e5194159e758218be18041e58a14c6b5257db0f84ea096eb7a6"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """All eight tasks with few samples each."""
    small = {name: task._replace(train=SMALL, test=SMALL) for name, task in MINICOIN.tasks.items()}
    return MINICOIN._replace(tasks=small).make(tmp_path_factory.mktemp("minicoin"))


def test_the_bytes_are_those_of_every_machine(folder):
    """A change of this hash is a change of the benchmark: MINICOIN's seed must change with it."""
    assert digest_of(folder) == DIGEST


@pytest.mark.parametrize("name", MINICOIN.tasks)
def test_files_are_coins(folder, name):
    assert list(MINICOIN.tasks) == list(COIN_DATASETS)
    place = folder / "Instructions_Original" / name
    questions = read_questions(place / COIN_DATASETS[name].questions)
    trained = read_conversations(place / "train.json")
    records = json.loads((place / "train.json").read_text())
    assert (len(questions), len(trained), len({record["id"] for record in records})) == (SMALL, SMALL, SMALL)
    for record in [*questions, *trained]:
        if record.image is None:
            assert name == "ScienceQA"
        else:
            with Image.open(folder / "images" / record.image) as image:
                assert image.size in (SIZES if name == "Grounding" else [(SIDE, SIDE)])
    for record in json.loads((place / COIN_DATASETS[name].questions).read_text()):
        assert {"answer_bbox", "size"} <= record.keys() or name != "Grounding"


@pytest.mark.parametrize("protocol", ("coin", "standard"))
@pytest.mark.parametrize("name", MINICOIN.tasks)
def test_a_perfect_answer_scores_in_full(folder, tmp_path, name, protocol):
    questions = read_questions(folder / "Instructions_Original" / name / COIN_DATASETS[name].questions)
    answers = tmp_path / "answers.jsonl"

    def score_of(texts):
        lines = [{"question_id": q.question_id, "text": text} for q, text in zip(questions, texts, strict=True)]
        answers.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return score(name, [folder / "Instructions_Original", folder / "annotations"], answers, protocol)

    perfect = score_of([question.answer for question in questions])
    assert (perfect.score, perfect.count) == (100, SMALL)
    assert perfect.mif == (None if protocol == "coin" else 100)
    assert score_of(["nothing of the kind"] * SMALL).score == 0


@pytest.mark.parametrize("name", MINICOIN.tasks)
def test_no_answer_is_right_for_most(name):
    given = [sample.answer for sample, _ in MINICOIN.samples(name, "balance", 300)]
    assert max(given.count(answer) for answer in set(given)) <= 165


def test_no_box_is_right_for_many_questions(folder):
    """The best of all boxes for every picture overlaps with one asked-for box in ten."""
    answers = [sample.answer for sample, _ in MINICOIN.samples("Grounding", "boxes", 300)]
    boxes = np.array([[float(number) for number in answer[1:-1].split(",")] for answer in answers])
    shared = np.minimum(boxes[:, None, 2:], boxes[None, :, 2:]) - np.maximum(boxes[:, None, :2], boxes[None, :, :2])
    overlap = shared.clip(0).prod(-1)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(-1)
    right = overlap / (areas[:, None] + areas - overlap) > 0.5
    assert right.diagonal().all() and right.mean(0).max() < 0.15


def test_a_box_is_the_shapes_own(tmp_path):
    """In the square that training pads a picture to, its colour is nowhere else, and reaches all four sides."""
    processor = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    transform, sizes = ImageTransform(processor), set()
    for index in range(60):
        canvas, placed = scene(StableRandom(f"box {index}"))
        height, width, _ = canvas.pixels.shape
        sizes.add((width, height))
        path = tmp_path / "scene.png"
        path.write_bytes(png(canvas.pixels))
        square = padded(canvas).pixels
        shown = processor(images=Image.fromarray(square), return_tensors="pt")["pixel_values"][0]
        assert torch.equal(transform(path), shown)  # as the trainer pads it
        assert 2 <= len({p.colour for p in placed}) == len(placed) <= 3
        for one in placed:
            ys, xs = np.nonzero((square == COLOURS[one.colour]).all(-1))
            seen = xs.min(), ys.min(), xs.max() + 1, ys.max() + 1
            assert np.abs(np.subtract(seen, one.box)).max() <= 1, (one, seen)
            assert one.numbers == [f"{place / SIDE:.2f}" for place in one.box]
            assert set(one.numbers) <= set(NUMBERS) and written_box(f"[{', '.join(one.numbers)}]")
    assert sizes == set(SIZES)


def test_a_patch_is_told_of_the_shape_that_it_shows():
    """A patch in which a colour is seen has the facts of a shape there; one that no box reaches has "nothing"."""
    told = 0
    for index in range(40):
        picture = scene_picture(StableRandom(f"patches {index}"))
        for patch in EVERYWHERE:
            row, column = (PATCH * place for place in divmod(patch, PATCHES))
            pixels = picture.canvas.pixels[row : row + PATCH, column : column + PATCH]
            seen = {colour: int((pixels == rgb).all(-1).sum()) for colour, rgb in COLOURS.items()}
            colour = picture.facts[f"colour_at_{patch}"]
            if colour == "nothing":
                assert max(seen.values()) == 0
                continue
            told += 1
            x1, y1, x2, y2 = (float(picture.facts[f"{corner}_at_{patch}"]) * SIDE for corner in CORNERS)
            assert x1 < column + PATCH and x2 > column and y1 < row + PATCH and y2 > row
            shape = picture.facts[f"shape_at_{patch}"]
            where = f"Which numbers say where the {colour} {shape} lies?"
            numbers = ", ".join(picture.facts[f"{corner}_at_{patch}"] for corner in CORNERS)
            assert (where, numbers) in [turn[:2] for turn in picture.turns]
    assert told > 100


def test_the_command(tmp_path, capsys):
    assert main(["make-minicoin", str(tmp_path), "--task", "Grounding"]) == 0
    assert "Grounding   1600 training samples, 400 questions" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["make-minicoin", str(tmp_path), "--task", "Flickr30k"])
