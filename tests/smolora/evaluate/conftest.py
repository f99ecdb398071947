"""A small LLaVA with an adapter, its folder, and test files with images."""

from __future__ import annotations

import json

import pytest
import torch

import small_llava
from smolora.backbones.llava import Llava
from smolora.data.images import ImageTransform
from smolora.data.prompts import PromptEncoder
from smolora.evaluate.generate import AnswerJob, generate_answers
from support.answers import BATCHED


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
def backbone(model, base_folder):
    encoder = IdEncoder.for_model(small_llava.small_tokenizer(), model.config)
    return Llava(encoder, ImageTransform.from_pretrained(base_folder))


@pytest.fixture(scope="session")
def questions(tmp_path_factory):
    """12 questions, the last 3 without an image."""
    return small_llava.write_questions(tmp_path_factory.mktemp("questions"), 12, without_image=3)


@pytest.fixture(scope="session")
def adapter_folder(tmp_path_factory):
    """The adapter of the fixture `model`, with seven instruction embeddings."""
    model = small_llava.small_adapter(small_llava.small_llava())
    config = model.peft_config["default"]
    config.instruction_embeddings = torch.randn(7, 384, generator=torch.Generator().manual_seed(3))
    folder = tmp_path_factory.mktemp("adapter") / "trained"
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
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


@pytest.fixture
def generate(model, backbone, tmp_path):
    """Answers a test file into `tmp_path / name`."""

    def run(questions, name="answers.jsonl", settings=BATCHED, embed=small_llava.embed_questions, model=model, **job):
        job = {"dataset": "VQAv2", "model_id": "small", **job}
        output = tmp_path / name
        job = AnswerJob(questions=questions, images=questions.parent, output=output, **job)
        generate_answers(model, backbone, job, embed=embed, settings=settings)
        return output

    return run


@pytest.fixture(scope="module")
def whole(model, backbone, questions, tmp_path_factory):
    """The answers of an uninterrupted run in one process."""
    output = tmp_path_factory.mktemp("whole") / "whole.jsonl"
    job = AnswerJob("VQAv2", questions, questions.parent, output, "small")
    generate_answers(model, backbone, job, embed=small_llava.embed_questions, settings=BATCHED)
    return output


@pytest.fixture
def count_batches(model, monkeypatch):
    """Counts calls of the model's generate; raises at call number `limit`."""

    def install(limit=None):
        calls, forward = [], model.generate

        def counted(**inputs):
            calls.append(1)
            if len(calls) == limit:
                raise RuntimeError("stopped")
            return forward(**inputs)

        monkeypatch.setattr(model, "generate", counted, raising=False)
        return calls

    return install
