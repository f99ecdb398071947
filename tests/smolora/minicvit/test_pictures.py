"""What the base models learn from: every word is known, only answers are learned, and no instruction is among them."""

import pytest

from smolora.data.prompts import IGNORED_LABEL, SYSTEM, PromptEncoder
from smolora.instructions.texts import MULTI_TYPE, SINGLE_TYPE
from smolora.minicvit.kinds import make_tokenizer
from smolora.minicvit.minicoin import INSTRUCTIONS, MINICOIN, MINICOIN_PICTURES
from smolora.minicvit.pictures import MINICVIT_PICTURES, converse
from smolora.minicvit.scenes import StableRandom
from smolora.minicvit.tasks import MINICVIT

WORLDS = {
    "minicvit": (MINICVIT, MINICVIT_PICTURES, (SINGLE_TYPE, MULTI_TYPE)),
    "minicoin": (MINICOIN, MINICOIN_PICTURES, (INSTRUCTIONS,)),
}


@pytest.fixture(scope="module")
def encoders():
    """The prompt encoder of each benchmark's base model."""
    made = {name: make_tokenizer(curriculum) for name, (_, curriculum, _) in WORLDS.items()}
    return {name: PromptEncoder(t, t.convert_tokens_to_ids("<image>"), 16) for name, t in made.items()}


@pytest.mark.parametrize(
    ("world", "name"), [(world, name) for world, (benchmark, *_) in WORLDS.items() for name in benchmark.tasks]
)
def test_every_text_of_the_benchmark_is_known_and_comes_back(world, name, encoders):
    encoder, (benchmark, _, tables) = encoders[world], WORLDS[world]
    unknown = encoder.tokenizer.unk_token_id
    for index, (sample, _) in enumerate(benchmark.samples(name, "words", 60)):
        for table in tables:
            instruction = table[name][index % len(table[name])]
            text = f"{sample.question}\n{instruction}" if sample.question else instruction
            for answer in sample.references or (sample.answer,):
                ids, labels = encoder.sample(text, answer, True)
                assert unknown not in ids, encoder.tokenizer.convert_ids_to_tokens(ids)
                assert encoder.decode([i for i in labels if i != IGNORED_LABEL]) == answer


def test_the_numbers_of_a_box_are_single_tokens(encoders):
    """So that a model of this size can learn where a shape is."""
    encoder = encoders["minicoin"]
    _, labels = encoder.sample("Where is it?", "[0.00, 0.25, 0.50, 1.00]", True)
    tokens = encoder.tokenizer.convert_ids_to_tokens([i for i in labels if i != IGNORED_LABEL])
    assert tokens == ["▁", "[", "0.00", ",", "▁0.25", ",", "▁0.50", ",", "▁1.00", "]", "</s>"]


@pytest.mark.parametrize("world", WORLDS)
def test_conversations_are_known_and_only_answers_are_learned(world, encoders):
    encoder, curriculum = encoders[world], WORLDS[world][1]
    system = encoder.tokenizer.convert_tokens_to_ids(SYSTEM)
    for index in range(80):
        picture = curriculum.draw(StableRandom(f"test {index}"))
        ids, labels = converse(picture, encoder, StableRandom(f"turns {index}"), 3)
        assert encoder.tokenizer.unk_token_id not in ids
        assert (ids.count(system), ids.count(encoder.tokenizer.bos_token_id)) == (1, 1)
        assert ids.count(encoder.image_token_id) == (16 if picture.canvas is not None else 0)
        assert ids.count(encoder.tokenizer.eos_token_id) == labels.count(encoder.tokenizer.eos_token_id) > 0
        asked = encoder.tokenizer.convert_tokens_to_ids("▁USER")
        assert asked in ids and asked not in labels
        for head, name in picture.facts.items():
            assert name in curriculum.heads[head].names


@pytest.mark.parametrize("world", WORLDS)
def test_no_instruction_occurs_in_the_alignment(world):
    """What the instructions ask for is left to the benchmark's stages."""
    _, curriculum, tables = WORLDS[world]
    turns = [turn for n in range(200) for turn in curriculum.draw(StableRandom(f"{n}")).turns]
    said = " ".join(f"{question} {sentence}" for question, _, sentence in turns)
    assert all(
        ("{}" in sentence or question == "Describe the picture.") and sentence.endswith(".")
        for question, _, sentence in turns
    )
    assert not any(answer.startswith("[") for _, answer, _ in turns)
    for table in tables:
        for instructions in table.values():
            assert not any(part in said for text in instructions for part in text.split("\n"))
