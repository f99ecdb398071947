"""A small LLaVA with an adapter, its folder, and test files with images."""

from __future__ import annotations

import pytest
import torch

import small_llava
from smolora.data.images import ImageTransform
from smolora.data.prompts import PromptEncoder


class IdEncoder(PromptEncoder):
    """Decodes to the ids themselves: answers are compared token for token."""

    def decode(self, ids):
        return " ".join(map(str, ids))


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory):
    return small_llava.save_base(tmp_path_factory.mktemp("base"), small_llava.small_llava())


@pytest.fixture(scope="session")
def model():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield small_llava.small_adapter(small_llava.small_llava())
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def encoder(model):
    return IdEncoder.for_model(small_llava.small_tokenizer(), model.config)


@pytest.fixture(scope="session")
def transform(base_folder):
    return ImageTransform.from_pretrained(base_folder)


@pytest.fixture(scope="session")
def questions(tmp_path_factory):
    """12 questions, the last 3 without an image."""
    return small_llava.write_questions(tmp_path_factory.mktemp("questions"), 12, without_image=3)
