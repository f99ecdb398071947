"""The command `smolora embed`."""

import json
from pathlib import Path

import pytest
import torch

from smolora import InstructionEncoder, cli
from smolora.cli import embed
from smolora.io.embeddings import read_instruction_embeddings
from smolora.io.tensors import read_tensors

CAPTION = "What is happening in the presented picture?\nPlease describe it in one complete sentence."
OBJECT = "What is the object in the image?\nAnswer the question using a single word or phrase."
PHRASE = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."


@pytest.fixture(scope="module")
def encoder() -> InstructionEncoder:
    return InstructionEncoder(device="cpu")


def test_command_line(tmp_path: Path, encoder: InstructionEncoder, capsys: pytest.CaptureFixture):
    """Texts, a list in a file with a row that is a mean, a text file; and the rows shown."""
    a, b, c = (str(tmp_path / name) for name in ("a.safetensors", "b.safetensors", "c.safetensors"))
    assert cli.main(["embed", "--text", PHRASE, "--text", CAPTION, "--output", a]) == 0
    assert torch.allclose(read_instruction_embeddings(a)[0], encoder.encode([PHRASE, CAPTION]), rtol=0, atol=1e-6)
    (tmp_path / "rows.json").write_text(json.dumps([PHRASE, [CAPTION, LETTER]]))
    assert cli.main(["embed", "--file", str(tmp_path / "rows.json"), "--output", b]) == 0
    embeddings, texts = read_instruction_embeddings(b)
    assert texts == [PHRASE, [CAPTION, LETTER]] and "sha256" in read_tensors(b)[1]
    assert torch.allclose(embeddings[1], encoder.encode([CAPTION, LETTER]).mean(0), rtol=0, atol=1e-6)
    (tmp_path / "rows.txt").write_text(f"{PHRASE}\n\n{LETTER}\n")
    assert cli.main(["embed", "--file", str(tmp_path / "rows.txt"), "--normalize", "--output", c]) == 0
    embeddings, texts = read_instruction_embeddings(c)
    assert texts == [PHRASE, LETTER] and torch.allclose(embeddings.norm(dim=1), torch.ones(2))
    capsys.readouterr()
    assert cli.main(["embed", "--show", b]) == 0
    shown = capsys.readouterr().out
    assert "2 rows of 384 numbers" in shown and LETTER in shown and len(shown.splitlines()) == 3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--text", "a"], "--output must be given"),
        (["--file", "rows.json", "--output", "o"], "--file must hold a list of texts"),
        (["--file", "empty.txt", "--output", "o"], "--file must hold an instruction"),
        (["--file", "none.txt", "--output", "o"], "none.txt"),
        (["--show", "none.safetensors"], "none.safetensors"),
        (["--text", "a", "--output", "o", "--model", "none"], "must be the folder of a sentence-transformers model"),
    ],
)
def test_command_line_errors(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    Path("rows.json").write_text('{"a": 1}')
    Path("empty.txt").write_text("\n")
    assert cli.main(["embed", *arguments]) == 1
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
    assert not Path("o").exists()


def test_rows_of_a_file_as_editors_write_it(tmp_path):
    """A byte order mark and the line ends of Windows are no part of an instruction; a separator within one is."""
    path = tmp_path / "rows.txt"
    for encoding in ("utf-8", "utf-8-sig"):
        path.write_bytes("Zwölf Wörter.\r\n\r\nOne\u2028line.\r\n".encode(encoding))
        assert embed._rows_of(path) == ["Zwölf Wörter.", "One\u2028line."]
        (tmp_path / "rows.json").write_bytes(json.dumps(["é", ["a", "b"]], ensure_ascii=False).encode(encoding))
        assert embed._rows_of(tmp_path / "rows.json") == ["é", ["a", "b"]]
    path.write_bytes("Wörter.".encode("utf-16"))
    with pytest.raises(ValueError, match=r"rows\.txt: must be UTF-8, got UTF-16: save it as UTF-8"):
        embed._rows_of(path)


def test_half_a_character_is_named(tmp_path, capsys):
    output = ["--output", str(tmp_path / "out.safetensors")]
    assert cli.main(["embed", "--text", "Describe \ud83d it.", *output]) == 1
    assert "half a character (the lone surrogate U+D83D at position 9)" in capsys.readouterr().err
