"""Datasets by name and protocol."""

from __future__ import annotations

import pytest

from smolora.evaluate.benchmarks import datasets_of, find_dataset, question_files
from smolora.evaluate.coin import COIN_DATASETS
from smolora.evaluate.datasets import DATASETS, PROTOCOLS
from smolora.evaluate.mcit import MCIT_DATASETS


def test_a_protocol_has_its_datasets():
    assert datasets_of("smolora") == {**DATASETS, **MCIT_DATASETS}
    assert datasets_of("coin") == COIN_DATASETS
    assert datasets_of("standard") == {**DATASETS, "Grounding": COIN_DATASETS["Grounding"], **MCIT_DATASETS}
    assert datasets_of() == datasets_of("standard")
    for protocol in PROTOCOLS:
        assert all(dataset.scoring(protocol) for dataset in datasets_of(protocol).values())


def test_a_dataset_of_another_protocol_is_named():
    with pytest.raises(ValueError, match="under protocol 'coin', got 'Flickr30k'; it is scored under 'smolora' and"):
        find_dataset("Flickr30k", "coin")
    with pytest.raises(ValueError, match="got 'Grounding'; it is scored under 'standard' and 'coin'"):
        find_dataset("Grounding", "smolora")
    with pytest.raises(ValueError, match="got 'grounding'; did you mean Grounding"):
        find_dataset("grounding", "coin")
    with pytest.raises(ValueError, match="protocol must be one that scores this dataset, got 'smolora'"):
        find_dataset("Grounding").scoring("smolora")


def test_question_files():
    assert question_files("OCRVQA") == {"test.json", "val.json"}
    assert question_files("Grounding") == {"test.json"}
