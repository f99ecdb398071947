"""Routing: sums over samples and over batches, by hand, and what is recorded where images have several rows.

Recording a LLaVA is tested with its answers.
"""

from __future__ import annotations

import pytest

from smolora.evaluate.routing import RoutingRecorder, summary, tally
from support.backbones import BACKBONES
from support.tiny_llava import embeddings

EXPERTS = {"up": (2, 3), "projector": (2, 3)}


def entry(layer: str, vu: list[int] | None, other: list[int] | None, alpha: float) -> dict:
    return {"layer": layer, "vu": vu, "if": other, "alpha": alpha, "beta": 1 - alpha}


def test_tally_sums_each_layer_over_the_samples_that_pass_it():
    samples = [
        [entry("projector", [1], [2], 0.25), entry("up", [0], [0], 0.5)],
        [entry("up", [1], [0], 0.75)],  # a sample without an image
    ]
    assert tally(samples, EXPERTS) == [
        {"layer": "projector", "samples": 1, "vu": [0, 1], "if": [0, 0, 1], "alpha": 0.25, "beta": 0.75},
        {"layer": "up", "samples": 2, "vu": [1, 1], "if": [2, 0, 0], "alpha": 1.25, "beta": 0.75},
    ]


def test_tally_counts_every_one_of_several_chosen_experts():
    (layer,) = tally([[entry("up", [0, 1], [2, 0], 0.5)]], EXPERTS)
    assert (layer["samples"], layer["vu"], layer["if"]) == (1, [1, 1], [1, 0, 1])


def test_a_branch_that_is_not_used_stays_none():
    (layer,) = tally([[entry("up", [0], None, 1.0)], [entry("up", [0], None, 1.0)]], EXPERTS)
    assert (layer["vu"], layer["if"]) == ([2, 0], None)
    assert summary([[layer], [layer]])[0]["if"] is None


def test_summary_weighs_batches_by_their_samples():
    first = tally([[entry("up", [0], [0], 0.0)]], EXPERTS)
    second = tally([[entry("up", [1], [2], 0.5)], [entry("up", [1], [0], 1.0)]], EXPERTS)
    (layer,) = summary([first, second])
    assert layer == {
        "layer": "up",
        "samples": 3,
        "vu": [1, 2],
        "if": [2, 0, 1],
        "alpha": pytest.approx(0.5),
        "beta": pytest.approx(0.5),
    }
    assert summary([]) == []


ROWS = [(5, [(0, 1)]), (9, [(1, 2)]), (6, [(1, 5), (0, 6)])]


@pytest.mark.parametrize("name", ["llava_next", "qwen2_5_vl", "idefics3", "llama4", "mllama"])
def test_a_sample_is_recorded_with_all_of_its_images_and_tiles(name):
    """As if it were alone, and without those that pad a batch."""
    model, backbone = BACKBONES[name].adapted(), BACKBONES[name]
    e, options = embeddings(len(ROWS)) * 2, {"max_new_tokens": 1, "do_sample": False}

    def recorded(rows, instructions):
        batch = backbone.batch(rows)
        with RoutingRecorder(model) as recorder:
            model.generate(**batch, instruction_embeds=instructions, **options)
            return recorder.samples(batch["attention_mask"])

    whole = recorded(ROWS, e)
    assert recorded(ROWS, e[0]) != whole
    images = [0, 0, 0]
    for i, row in enumerate(ROWS):
        (alone,) = recorded([row], e[i : i + 1])
        assert [layer["layer"] for layer in whole[i]] == [layer["layer"] for layer in alone]
        for layer, other in zip(whole[i], alone, strict=True):
            assert (layer["vu"], layer["if"]) == (other["vu"], other["if"]), layer["layer"]
            assert layer["alpha"] == pytest.approx(other["alpha"], abs=1e-5)
            assert layer["alpha"] + layer["beta"] == pytest.approx(1)
            images[i] = max(images[i], len(layer["vu"]))
    assert images == {"llava_next": [3, 5, 8], "qwen2_5_vl": [1, 1, 2]}.get(name, [1, 2, 3])
