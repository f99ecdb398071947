"""Instruction embeddings kept on the disk."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import smolora
from smolora.io.embeddings import read_instruction_embeddings, write_instruction_embeddings


def test_round_trip(tmp_path: Path):
    """Embeddings to the bit, texts beside: one, several for a mean, or none; a file or a folder."""
    embeddings = torch.randn(3, 5)
    texts = ["Größe? 大小\nIn one line.", ["a", "b"], None]
    write_instruction_embeddings(tmp_path, embeddings, texts)
    path = tmp_path / "instruction_embeddings.safetensors"
    for place in (tmp_path, path):
        found, said = read_instruction_embeddings(place)
        assert torch.equal(found, embeddings) and said == texts
    found.zero_()  # its own memory, not the file's
    assert torch.equal(read_instruction_embeddings(path)[0], embeddings)


def test_configuration_reads_them(tmp_path: Path):
    """What is written here is what `default_instruction` is a row of."""
    embeddings = torch.randn(3, 12)
    write_instruction_embeddings(tmp_path, embeddings, ["a", "b", "c"])
    smolora.SMoLoRAConfig(instruction_dim=12, default_instruction=1).save_pretrained(str(tmp_path))
    config = smolora.SMoLoRAConfig.from_pretrained(str(tmp_path))
    assert torch.equal(config.default_embedding(), embeddings[1])


def test_files_of_other_writers(tmp_path: Path):
    """Without texts, which are not needed to compute."""
    save_file({"embeddings": torch.ones(2, 3)}, tmp_path / "a.safetensors")
    assert read_instruction_embeddings(tmp_path / "a.safetensors")[1] == [None, None]


def test_a_file_of_another_kind_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"must be a \.safetensors file or an existing folder, got .*rows\.bin"):
        write_instruction_embeddings(tmp_path / "rows.bin", torch.ones(2, 3), ["a", "b"])


@pytest.mark.parametrize(
    ("embeddings", "texts", "words"),
    [
        (torch.ones(3), ["a"], "(3,)"),
        (torch.ones(0, 3), [], "(0, 3)"),
        (torch.ones(1, 3, dtype=torch.int64), ["a"], "torch.int64"),
        (torch.tensor([[1.0, torch.nan]]), ["a"], "must be finite"),
        (torch.ones(2, 3), ["a"], "one for each of the 2 embeddings, got 1"),
    ],
)
def test_writing_refused(embeddings: torch.Tensor, texts: list, words: str, tmp_path: Path):
    with pytest.raises(ValueError, match=re.escape(words)):
        write_instruction_embeddings(tmp_path, embeddings, texts)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("tensors", "metadata", "words"),
    [
        ({"vectors": torch.ones(1, 3)}, None, "'vectors'"),
        ({"embeddings": torch.ones(1, 3), "more": torch.ones(1)}, None, "alone"),
        ({"embeddings": torch.ones(3)}, None, "(3,)"),
        ({"embeddings": torch.ones(1, 3).int()}, None, "torch.int32"),
        ({"embeddings": torch.full((1, 3), torch.inf)}, None, "must be finite"),
        ({"embeddings": torch.ones(2, 3)}, {"texts": '["a"]'}, "a text for each of its 2 rows"),
        ({"embeddings": torch.ones(1, 3)}, {"texts": "a"}, "its texts cannot be read"),
    ],
)
def test_reading_refused(tensors: dict, metadata: dict | None, words: str, tmp_path: Path):
    save_file(tensors, tmp_path / "a.safetensors", metadata)
    with pytest.raises(ValueError, match=re.escape(words)):
        read_instruction_embeddings(tmp_path / "a.safetensors")
