"""MiniCVIT: a small synthetic version of the benchmark's ten tasks.

    Instructions_Single/<task>/      train.json, test.json or val.json (Places365: train_5shot.json, train_10shot.json)
    Instructions_Multi/<task>/       the same questions, with instructions of five wordings

`smolora.minicvit.files` has the rest of the layout. Digits are real, from scikit-learn, and split into training and
test. Everything else is drawn. Training and test files share words, objects and places, but not pictures: combinations,
colours and positions vary.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..instructions.texts import MULTI_TYPE, SINGLE_TYPE
from . import scenes
from .files import UNANSWERABLE, Benchmark, DrawnSample, TaskSpec
from .scenes import COLOURS, COMPANIONS, DIGITS, OBJECTS, PLACES, SHAPES, WORDS, StableRandom

# ---- one sample of each task


# a question's choices always have the same order, so a letter can be learned from the picture
QUIZ: dict[str, tuple[tuple[str, ...], ...]] = {
    "Which number is written here?": (DIGITS[:5], DIGITS[5:]),
    "What is shown in the picture?": (OBJECTS[:4], OBJECTS[4:]),
    "Which colour is the shape?": (tuple(COLOURS),),
    "Which shape is it?": (SHAPES,),
}
KINDS = {"colour": tuple(COLOURS), "number": DIGITS, "object": OBJECTS, "place": PLACES, "shape": SHAPES}


def science_qa(rng: StableRandom, held_out: bool) -> DrawnSample:
    """Ask a multiple-choice question about a picture, or about a word without a picture; the answer is a letter."""
    topic = rng.choice(["digit", "object", "object", "colour", "shape", "kind"])
    colour = rng.choice(list(COLOURS))
    if topic == "kind":
        kind = rng.choice(list(KINDS))
        question, right, choices, canvas = f"What is {rng.choice(KINDS[kind])}?", kind, tuple(KINDS), None
    elif topic == "digit":
        question, right = "Which number is written here?", rng.choice(DIGITS)
        canvas = scenes.draw_digit(DIGITS.index(right), colour, rng, held_out)
    elif topic == "object":
        question, right = "What is shown in the picture?", rng.choice(OBJECTS)
        canvas = scenes.draw_object(right, colour, rng)
    else:
        shape = rng.choice(SHAPES)
        question, right = ("Which colour is the shape?", colour) if topic == "colour" else ("Which shape is it?", shape)
        canvas = scenes.draw_one_shape(shape, colour, rng)
    if topic != "kind":
        choices = next(choices for choices in QUIZ[question] if right in choices)
    return DrawnSample(question + options(choices), "ABCDE"[choices.index(right)], canvas, choices=choices)


def options(choices: Sequence[str]) -> str:
    """Format choices as the prompt lists them, one on each line."""
    return "".join(f"\n{letter}. {choice}" for letter, choice in zip("ABCDE", choices, strict=False))


def text_vqa(rng: StableRandom, held_out: bool) -> DrawnSample:
    """Ask for the word on a sign."""
    word = rng.choice(WORDS)
    question = rng.choice(["What word is on the sign?", "What does the sign say?", "Which word is written here?"])
    return DrawnSample(question, word, scenes.draw_sign(word, rng.choice(list(COLOURS)), rng))


SUBJECTS = ("A person", "A man", "Somebody", "Our friend")
SHIRTS = ("in a {} shirt", "wearing {}", "dressed in {}", "with a {} top")
VERBS = ("stands", "is", "waits", "rests")
WITH = {
    "dog": ("with a dog", "beside a dog", "next to a dog"),
    "ball": ("with a ball", "beside a ball", "next to a ball"),
    "umbrella": ("with an umbrella", "holding an umbrella", "under an umbrella"),
}
WHERE = {
    "beach": ("on the beach", "by the sea", "at the shore"),
    "forest": ("in the forest", "among trees", "between tall pines"),
    "desert": ("in the desert", "on hot sand", "near a cactus"),
    "city": ("in the city", "on a street", "downtown"),
    "mountain": ("in the mountains", "below high peaks", "under snowy tops"),
    "field": ("in a field", "on green grass", "on a meadow"),
}


def flickr(rng: StableRandom, held_out: bool) -> DrawnSample:
    """Draw a person, a companion and a place, captioned by five people."""
    colour, companion, where = rng.choice(list(COLOURS)), rng.choice(COMPANIONS), rng.choice(PLACES)
    canvas = scenes.draw_person(colour, companion, where, rng)

    def caption() -> str:
        parts = (SUBJECTS, SHIRTS, VERBS, WITH[companion], WHERE[where])
        return " ".join(rng.choice(part) for part in parts).format(colour) + "."

    references = tuple(caption() for _ in range(5))
    return DrawnSample("", references[0], canvas, references)


def image_net(rng: StableRandom, held_out: bool) -> DrawnSample:
    """Ask for the class of an object or of a handwritten digit."""
    colour = rng.choice(list(COLOURS))
    name = rng.choice(OBJECTS + DIGITS)
    if name in DIGITS:
        return DrawnSample("", name, scenes.draw_digit(DIGITS.index(name), colour, rng, held_out))
    return DrawnSample("", name, scenes.draw_object(name, colour, rng))


def gqa(rng: StableRandom, held_out: bool) -> DrawnSample:
    """Draw two shapes, side by side or one above the other, and ask a question of several steps."""
    shape, other = rng.sample(SHAPES, 2)
    colour, other_colour = rng.sample(list(COLOURS), 2)
    first, second, relation, inverse = rng.choice(
        [
            (0, 1, "to the left of", "to the right of"),
            (2, 3, "to the left of", "to the right of"),
            (0, 2, "above", "below"),
            (1, 3, "above", "below"),
        ]
    )
    canvas = scenes.draw_shapes({first: (shape, colour), second: (other, other_colour)}, rng)
    asked = rng.choice(["colour", "shape", "relation"])
    if asked == "relation":
        right = rng.chance(50)
        claim = relation if right else inverse
        return DrawnSample(f"Is the {shape} {claim} the {other}?", "yes" if right else "no", canvas, kind="verify")
    if rng.chance(50):  # ask about the other shape
        shape, colour, other, other_colour, relation = other, other_colour, shape, colour, inverse
    if asked == "colour":
        return DrawnSample(f"What colour is the shape {relation} the {other}?", colour, canvas, kind="query")
    return DrawnSample(f"What is {relation} the {other_colour} shape?", shape, canvas, kind="query")


def vqa(rng: StableRandom, held_out: bool) -> DrawnSample:
    """Ask a question whose answer is yes, no or a number."""
    asked = rng.choice(["count", "there", "digit", "larger"])
    if asked in ("digit", "larger"):
        number = rng.below(10)
        canvas = scenes.draw_digit(number, rng.choice(list(COLOURS)), rng, held_out)
        if asked == "digit":
            return DrawnSample("What number is written here?", str(number), canvas)
        return DrawnSample("Is the number larger than 4?", "yes" if number > 4 else "no", canvas)
    cells = rng.sample(range(4), rng.between(1, 4))
    shown = {cell: (rng.choice(SHAPES), rng.choice(list(COLOURS))) for cell in cells}
    canvas = scenes.draw_shapes(shown, rng)
    if asked == "count":
        return DrawnSample("How many shapes are there?", str(len(cells)), canvas)
    there = {shape for shape, _ in shown.values()}
    missing = [shape for shape in SHAPES if shape not in there]
    right = rng.chance(50) or not missing
    shape = rng.choice(sorted(there) if right else missing)
    return DrawnSample(f"Is there a {shape}?", "yes" if right else "no", canvas)


def viz_wiz(rng: StableRandom, held_out: bool) -> DrawnSample:
    """Ask TextVQA's and other questions about blurred pictures, some of them unreadable."""
    unreadable = rng.chance(15)
    if rng.chance(50):
        sample = text_vqa(rng, held_out)
    else:
        sample = image_net(rng, held_out)._replace(question="What is this?")
    assert sample.canvas is not None  # either kind has a picture
    sample.canvas.blur(7 if unreadable else 1)
    return sample._replace(answer=UNANSWERABLE) if unreadable else sample


def text_caps(rng: StableRandom, held_out: bool) -> DrawnSample:
    """Ask for a caption that has the word in the picture."""
    word, colour = rng.choice(WORDS), rng.choice(list(COLOURS))
    canvas = scenes.draw_sign(word, colour, rng)
    forms: tuple[str, ...] = ("A {} sign with the word {}.", "A {} sign says {}.", "There is a {} sign that reads {}.")
    forms += ("On a {} sign is the word {}.", "A {} sign stands here with the text {}.")
    references = tuple(form.format(colour, word) for form in rng.sample(forms, len(forms)))
    return DrawnSample("", references[0], canvas, references)


def ocr_vqa(rng: StableRandom, held_out: bool) -> DrawnSample:
    """Ask for the title on a book's cover, two words."""
    words = rng.sample(WORDS, 2)
    question = rng.choice(["What is the title of this book?", "What is the book called?"])
    return DrawnSample(question, " ".join(words), scenes.draw_book(words, rng.choice(list(COLOURS)), rng))


def places(rng: StableRandom, held_out: bool) -> DrawnSample:
    """Ask for the background."""
    name = rng.choice(PLACES)
    return DrawnSample("", name, scenes.draw_place(name, rng))


# ---- the table


TRAIN = 1600
TASKS: dict[str, TaskSpec] = {
    "ScienceQA": TaskSpec(science_qa, "test.json", TRAIN),
    "TextVQA": TaskSpec(text_vqa, "val.json", TRAIN),
    "Flickr30k": TaskSpec(flickr, "val.json", TRAIN),
    "ImageNet": TaskSpec(image_net, "test.json", TRAIN),
    "GQA": TaskSpec(gqa, "test.json", TRAIN),
    "VQAv2": TaskSpec(vqa, "val.json", TRAIN),
    "VizWiz": TaskSpec(viz_wiz, "val.json"),
    "TextCaps": TaskSpec(text_caps, "val.json"),
    "OCRVQA": TaskSpec(ocr_vqa, "test.json"),
    "Places365": TaskSpec(places, "val.json"),
}
MINICVIT = Benchmark(
    "MiniCVIT", "MiniCVIT 1", TASKS, {"Instructions_Single": SINGLE_TYPE, "Instructions_Multi": MULTI_TYPE}
)
