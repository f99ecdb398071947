"""Four parts become one Blip2 that computes what MiniGPT-4's released code computed (tests/golden/minigpt4)."""

import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoProcessor,
    Blip2Config,
    Blip2ForConditionalGeneration,
    BlipImageProcessorPil,
)

from smolora import cli
from smolora.official import minigpt4
from smolora.official.minigpt4 import released_config
from support.minigpt4 import (
    LANGUAGE,
    PARTS,
    PROJECTOR,
    QFORMER,
    QUERIES,
    SIZES,
    VISION,
    WORDS,
    assemble_golden,
    with_tokenizer,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("assembled") / "minigpt4"
    assemble_golden(folder)
    return folder


# ------------------------------------------------------------------------------------------- as the released code does


def test_released_features_and_logits(folder: Path):
    """The released ViT, LayerNorm, Q-Former and projection, then the Llama. The released code has no image token: it
    puts the features between the embeddings of two pieces of text."""
    expected = load_file(PARTS / "expected.safetensors")
    model = Blip2ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    rows = expected["input_ids"].tolist()
    image = [model.config.image_token_id]
    ids = torch.tensor([[t for token in row for t in (image * QUERIES if token < 0 else [token])] for row in rows])
    with torch.no_grad():
        features = model.get_image_features(expected["pixel_values"]).pooler_output
        logits = model(pixel_values=expected["pixel_values"], input_ids=ids).logits[..., :WORDS]
    assert (features - expected["image_features"]).abs().max() <= 5e-6  # they are of size 1
    assert (logits - expected["logits"]).abs().max() <= 1e-5
    assert (features[0] - features[1]).abs().mean() > 0.1  # and not of the queries alone


def test_released_sizes():
    """731 tensors beside the language model, 32 queries of 768, 257 positions of 1408. The released Q-Former is never
    in training mode, so it has no dropout."""
    text = {"model_type": "llama", "num_hidden_layers": 1, "hidden_size": 64, "vocab_size": 64}
    config = Blip2Config(**{**released_config().to_dict(), "text_config": text})
    assert (config.qformer_config.hidden_dropout_prob, config.qformer_config.attention_probs_dropout_prob) == (0, 0)
    with torch.device("meta"):
        model = Blip2ForConditionalGeneration(config)
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters() if not n.startswith("language_model.")}
    assert len(shapes) == 731
    assert shapes["query_tokens"] == (1, 32, 768)
    assert shapes["vision_model.embeddings.position_embedding"] == (1, 257, 1408)
    assert shapes["vision_model.encoder.layers.38.mlp.fc1.weight"] == (6144, 1408)
    assert shapes["qformer.encoder.layer.10.crossattention.attention.key.weight"] == (768, 1408)
    assert "qformer.encoder.layer.11.crossattention.attention.key.weight" not in shapes


# ----------------------------------------------------------------------------------------------------- what is written


def test_values_are_the_parts(folder: Path, tmp_path: Path):
    """Bit for bit, under the names that transformers writes."""
    model, info = Blip2ForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    model.save_pretrained(tmp_path)
    ours = load_file(folder / "model.safetensors")
    assert ours.keys() == load_file(tmp_path / "model.safetensors").keys()
    vision = torch.load(VISION, weights_only=True)
    qformer, projector = (torch.load(path, weights_only=True)["model"] for path in (QFORMER, PROJECTOR))
    for name, value in {
        "vision_model.embeddings.class_embedding": vision["cls_token"],
        "vision_model.embeddings.patch_embedding.weight": vision["patch_embed.proj.weight"],
        "vision_model.encoder.layers.1.layer_norm2.bias": vision["blocks.1.norm2.bias"],
        "vision_model.encoder.layers.1.self_attn.qkv.weight": vision["blocks.1.attn.qkv.weight"],
        "vision_model.encoder.layers.0.self_attn.projection.weight": vision["blocks.0.attn.proj.weight"],
        "vision_model.post_layernorm.weight": qformer["ln_vision.weight"],
        "query_tokens": qformer["query_tokens"],
        "qformer.layernorm.bias": qformer["Qformer.bert.embeddings.LayerNorm.bias"],
        "qformer.encoder.layer.2.crossattention.attention.value.weight": qformer[
            "Qformer.bert.encoder.layer.2.crossattention.self.value.weight"
        ],
        "qformer.encoder.layer.1.output_query.LayerNorm.weight": qformer[
            "Qformer.bert.encoder.layer.1.output_query.LayerNorm.weight"
        ],
        "language_projection.weight": projector["llama_proj.weight"],
    }.items():
        assert torch.equal(ours[name], value), name
    query, key, value = ours["vision_model.encoder.layers.1.self_attn.qkv.bias"].chunk(3)
    assert torch.equal(query, vision["blocks.1.attn.q_bias"]) and torch.equal(value, vision["blocks.1.attn.v_bias"])
    assert not key.any()
    for name, value in load_file(LANGUAGE / "model.safetensors").items():
        if "inv_freq" not in name:
            assert torch.equal(ours[f"language_model.{name}"][: len(value)], value)


def test_vocabulary(folder: Path):
    """Image and padding tokens behind the language model's own."""
    config = json.loads((folder / "config.json").read_text())
    assert (config["image_token_index"], config["pad_token_id"], config["text_config"]["vocab_size"]) == (96, 97, 128)
    assert config["model_type"] == "blip-2" and config["num_query_tokens"] == QUERIES
    assert str(LANGUAGE) not in json.dumps(config)


def test_what_has_no_place_is_told(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    """The released code drops it without a word: the ViT's last layer and head, T5's projection, buffers."""
    monkeypatch.setattr(minigpt4, "released_config", lambda: SIZES)
    command = ["assemble", "--minigpt4", "--language", LANGUAGE, "--vision", VISION, "--qformer", QFORMER]
    assert cli.main([*map(str, command), "--projector", str(PROJECTOR), "--output", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr()
    assert "left out of --vision, as in the released code: 'blocks.2.attn.proj.bias'" in printed.err
    assert "left out of --qformer, as in the released code: 'Qformer.bert.embeddings.position_ids'," in printed.err
    assert "'t5_proj.bias', 't5_proj.weight'" in printed.err
    assert "it has no tokenizer" in printed.err and "wrote" in printed.out
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_the_last_file_counts(tmp_path: Path):
    """A MiniGPT-4 whose Q-Former was trained, too, has it beside the projection."""
    state = torch.load(PROJECTOR, weights_only=True)
    state["model"]["query_tokens"] = torch.ones(1, QUERIES, 24)
    torch.save(state, tmp_path / "p.pth")
    assemble_golden(tmp_path / "out", projector=tmp_path / "p.pth")
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["query_tokens"], torch.ones(1, QUERIES, 24))


def test_tied_embeddings(tmp_path: Path):
    """Stored once, as transformers stores them."""
    shutil.copytree(LANGUAGE, tmp_path / "language")
    state = load_file(LANGUAGE / "model.safetensors")
    del state["lm_head.weight"]
    save_file(state, tmp_path / "language" / "model.safetensors")
    config = json.loads((LANGUAGE / "config.json").read_text())
    (tmp_path / "language" / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    assemble_golden(tmp_path / "out", language=tmp_path / "language")
    assert "language_model.lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")
    model = Blip2ForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert torch.equal(model.language_model.lm_head.weight[:WORDS], state["model.embed_tokens.weight"])


# ------------------------------------------------------------------------------------------------------------ processor


def test_processor(tmp_path: Path):
    """The released prompt with an image token a query, and the released evaluation's pixels: plain bicubic resizing,
    CLIP's mean and deviation."""
    assemble_golden(tmp_path / "out", language=with_tokenizer(tmp_path / "language"))
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    template = partial(processor.tokenizer.apply_chat_template, tokenize=False)
    chat = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?\nIn one word."}]},
        {"role": "assistant", "content": [{"type": "text", "text": "Dog"}]},
    ]
    image = "<image>" * QUERIES
    prompt = f"###Human: <Img>{image}</Img> What?\nIn one word. ###Assistant: "
    assert template(chat[:1], add_generation_prompt=True) == prompt
    assert template(chat) == f"{prompt}Dog###"
    more = [*chat, {"role": "user", "content": "Sure?"}]
    again = template(more, add_generation_prompt=True)
    assert again == f"{prompt}Dog###Human: Sure? ###Assistant: "
    picture = np.random.default_rng(0).integers(0, 256, (40, 33, 3), dtype=np.uint8)
    batch = processor(images=[Image.fromarray(picture)], text=[prompt], return_tensors="pt")
    assert (batch["input_ids"] == 96).sum() == QUERIES and processor.tokenizer.pad_token_id == 97
    resized = np.asarray(Image.fromarray(picture).resize((28, 28), Image.Resampling.BICUBIC)).astype(np.float64) / 255
    mean, deviation = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    expected = torch.from_numpy((resized - mean) / deviation).permute(2, 0, 1)
    assert (batch["pixel_values"][0].double() - expected).abs().max() <= 1e-6
    model = Blip2ForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        assert model(**batch).logits.isfinite().all()
    assert type(BlipImageProcessorPil.from_pretrained(tmp_path / "out")) is BlipImageProcessorPil


def test_larger_tokenizer(tmp_path: Path):
    with pytest.raises(ValueError, match=r"language: .* has a tokenizer of 98 tokens, and embeddings of 96"):
        assemble_golden(tmp_path / "out", language=with_tokenizer(tmp_path / "language", more=2))


# ----------------------------------------------------------------------------------------------------- what is refused


def changed(path: Path, source: Path, name: str, change) -> Path:
    """A part whose tensor is changed, or removed where the change gives None."""
    loaded = torch.load(source, weights_only=True)
    state = loaded.get("model", loaded)
    state[name] = change(state[name])
    if state[name] is None:
        del state[name]
    torch.save(loaded, path)
    return path


def gone(tensor: torch.Tensor) -> None:
    return None


KEY = "Qformer.bert.encoder.layer.0.crossattention.self.key.weight"
BROKEN = [
    ("vision", VISION, "cls_token", gone, ["vision: ", "lacks", "embeddings.class_embedding"]),
    ("vision", VISION, "blocks.1.attn.v_bias", gone, ["vision: ", "lacks", "layers.1.self_attn.qkv.bias"]),
    ("vision", VISION, "pos_embed", lambda t: t[:, 1:], ["position_embedding", "(1, 17, 32)", "(1, 16, 32)"]),
    ("vision", VISION, "blocks.0.attn.q_bias", lambda t: t[1:], ["self_attn.qkv.bias", "(96,)", "(95,)"]),
    ("qformer", QFORMER, "ln_vision.bias", gone, ["qformer: ", "lacks", "post_layernorm.bias"]),
    ("qformer", QFORMER, KEY, gone, ["qformer: ", "lacks", "layer.0.crossattention.attention.key.weight"]),
    ("qformer", QFORMER, KEY, lambda t: t.to(torch.int8), ["key.weight", "floating point", "torch.int8"]),
    ("qformer", QFORMER, "query_tokens", lambda t: t[:, :4], ["query_tokens", "(1, 5, 24)", "(1, 4, 24)"]),
    ("projector", PROJECTOR, "llama_proj.bias", gone, ["projector: ", "lacks", "language_projection.bias"]),
    (  # as the version with Llama 2 has it
        "projector",
        PROJECTOR,
        "llama_proj.weight",
        lambda t: torch.ones(64, 128),
        ["language_projection.weight", "(64, 24)", "(64, 128)"],
    ),
]


@pytest.mark.parametrize(
    ("argument", "source", "name", "change", "words"), BROKEN, ids=[f"{b[0]} {b[2]} {b[4][-1]}" for b in BROKEN]
)
def test_broken_parts(argument: str, source: Path, name: str, change, words: list[str], tmp_path: Path):
    """By name, before anything is written."""
    part = changed(tmp_path / "part.pth", source, name, change)
    with pytest.raises(ValueError) as raised:
        assemble_golden(tmp_path / "out", **{argument: part})
    assert all(word in str(raised.value) for word in words), str(raised.value)
    assert [p.name for p in tmp_path.iterdir()] == ["part.pth"]


def test_flipped_bits(tmp_path: Path):
    """Among the values of an entry of a pickle."""
    raw = bytearray(PROJECTOR.read_bytes())
    place = raw.index(torch.load(PROJECTOR, weights_only=True)["model"]["llama_proj.bias"].numpy().tobytes())
    raw[place] ^= 1
    (tmp_path / "p.pth").write_bytes(raw)
    with pytest.raises(ValueError, match=r"'llama_proj\.bias'"):
        assemble_golden(tmp_path / "out", projector=tmp_path / "p.pth")


def test_wrong_language_models(tmp_path: Path):
    """Another family, a vocabulary that is not its configuration's, and a tensor too many."""
    shutil.copytree(LANGUAGE, tmp_path / "language")
    config = json.loads((LANGUAGE / "config.json").read_text())
    for changes, words in (
        ({"model_type": "mistral"}, "language must be a Vicuna, of model_type 'llama', got model_type 'mistral'"),
        ({"vocab_size": 90}, r"'language_model.lm_head.weight' must be .* \(90, 64\), got .*\(96, 64\)"),
        ({"num_hidden_layers": 1}, "language: .* has what a Llama of these sizes has no place for: 'language_model.mo"),
        ({"num_hidden_layers": 3}, "language: .* lacks 'language_model.model.layers.2"),
        ({"hidden_act": "nope"}, "nope"),
    ):
        (tmp_path / "language" / "config.json").write_text(json.dumps({**config, **changes}))
        with pytest.raises(ValueError, match=words):
            assemble_golden(tmp_path / "out", language=tmp_path / "language")


def test_wrong_arguments(tmp_path: Path, capsys: pytest.CaptureFixture):
    """Parts of the other model, missing files, an output that is there."""
    shared = ["--language", LANGUAGE, "--vision", VISION, "--projector", PROJECTOR, "--output", tmp_path / "out"]
    for more, words in (
        (["--minigpt4"], "got --minigpt4 without --qformer"),
        (["--qformer", QFORMER], f"got --qformer {QFORMER} without --minigpt4"),
    ):
        assert cli.main(["assemble", *map(str, [*shared, *more])]) == 1
        assert words in capsys.readouterr().err
    with pytest.raises(FileNotFoundError, match=r"none\.pth"):
        assemble_golden(tmp_path / "out", vision=tmp_path / "none.pth")
    with pytest.raises(ValueError, match=r"qformer: .* lacks 'qformer.encoder.* and .* more"):
        assemble_golden(tmp_path / "out", qformer=PROJECTOR)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "there").touch()
    with pytest.raises(FileExistsError, match="output must be a new or empty folder"):
        assemble_golden(tmp_path / "out")
