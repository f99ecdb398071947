"""Three parts become one LLaVA, and with a converted adapter it computes what the released code computed."""

import json
import shutil
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from smolora import SMoLoRAConfig, cli
from smolora.io.embeddings import read_instruction_embeddings, write_instruction_embeddings
from smolora.official.assemble import assemble, load_processor
from smolora.official.convert import convert_official, convert_to_official

GOLDEN = Path(__file__).parents[2] / "golden" / "llava"
LANGUAGE, VISION, PROJECTOR = GOLDEN / "language", GOLDEN / "vision", GOLDEN / "mm_projector.bin"
WORDS = 96  # the golden language model's vocabulary
PATCHES = 16


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("assembled") / "llava"
    assemble(LANGUAGE, VISION, PROJECTOR, folder)
    return folder


@pytest.fixture(scope="module")
def adapted(llava: Path, tmp_path_factory: pytest.TempPathFactory) -> PeftModel:
    """The golden adapter on the golden base, with stock transformers and stock PEFT."""
    folder = tmp_path_factory.mktemp("converted") / "adapter"
    convert_official(GOLDEN / "adapter", folder)
    base = AutoModelForImageTextToText.from_pretrained(llava, dtype=torch.float32)
    return PeftModel.from_pretrained(base, str(folder)).eval()


@pytest.fixture(scope="module")
def expected() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "expected.safetensors")


def inputs(expected: dict[str, torch.Tensor], samples: slice, image_token: int) -> dict[str, torch.Tensor]:
    """Golden inputs with an image token for each patch, where the released code has one -200."""
    rows = []
    for row in expected["input_ids"][samples].tolist():
        rows.append([t for token in row for t in ([image_token] * PATCHES if token == -200 else [token])])
    ids = torch.tensor(rows)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": expected["pixel_values"][samples],
    }


# ------------------------------------------------------------------------------------------- as the released code does


@pytest.mark.parametrize("row", [0, 3])
def test_released_logits(row: int, adapted: PeftModel, expected: dict[str, torch.Tensor]):
    """All positions of all samples, by the instruction that was set by hand; the other row's logits are far off."""
    embedding = torch.tensor(json.loads((GOLDEN / "adapter" / "adapter_config.json").read_text())["ins_emb"])[row]
    batch = inputs(expected, slice(None), adapted.config.image_token_id)
    with torch.no_grad():
        logits = adapted(**batch, instruction_embeds=embedding).logits[..., :WORDS]
    assert (logits - expected[f"logits_ins{row}"]).abs().max() <= 1e-5
    assert (logits - expected[f"logits_ins{3 - row}"]).abs().max() > 1e-2


def test_released_instruction_is_the_default(adapted: PeftModel, expected: dict[str, torch.Tensor]):
    """The row that the released adapter was left at (`ins_type`) is what a call without an embedding takes."""
    with torch.no_grad():
        logits = adapted(**inputs(expected, slice(None), adapted.config.image_token_id)).logits[..., :WORDS]
    assert (logits - expected["logits_ins3"]).abs().max() <= 1e-5


@pytest.mark.parametrize(("key", "use_cache"), [("greedy_use_cache", True), ("greedy_no_cache", False)])
def test_released_tokens(key: str, use_cache: bool, adapted: PeftModel, expected: dict[str, torch.Tensor]):
    """Greedy decoding, sample by sample; with a cache the released code routes every new token by itself, which gives
    another text than without."""
    golden = json.loads((GOLDEN / "expected_generation.json").read_text())
    assert golden["greedy_use_cache"] != golden["greedy_no_cache"]
    for sample, tokens in enumerate(golden[key]):
        batch = inputs(expected, slice(sample, sample + 1), adapted.config.image_token_id)
        generated = adapted.generate(
            **batch,
            max_new_tokens=golden["max_new_tokens"],
            eos_token_id=golden["eos_token_id"],
            do_sample=False,
            use_cache=use_cache,
        )
        assert generated[0, batch["input_ids"].shape[1] :].tolist() == tokens


def test_saved_by_peft_and_back_again(adapted: PeftModel, tmp_path: Path):
    """What stock PEFT saves of it goes back to the released code, bit for bit."""
    adapted.save_pretrained(str(tmp_path / "peft"))
    convert_to_official(tmp_path / "peft", tmp_path / "back")
    folders = (tmp_path / "back", GOLDEN / "adapter")
    back, source = (torch.load(folder / "adapter_model.bin", weights_only=True) for folder in folders)
    assert list(back) == list(source) and all(torch.equal(back[name], source[name]) for name in source)
    configs = [json.loads((folder / "adapter_config.json").read_text()) for folder in folders]
    assert configs[0] == configs[1]


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "instruction_embeddings.safetensors"])
@pytest.mark.parametrize("writer", ["convert-official", "peft"])
def test_flipped_bits_are_not_loaded(writer: str, file: str, llava: Path, adapted: PeftModel, tmp_path: Path):
    """Stock PEFT alone would load them: both writers leave checksums, and the configuration compares them."""
    if writer == "peft":
        adapted.save_pretrained(str(tmp_path / "adapter"))
    else:
        convert_official(GOLDEN / "adapter", tmp_path / "adapter")
    raw = bytearray((tmp_path / "adapter" / file).read_bytes())
    raw[-1000] ^= 4
    (tmp_path / "adapter" / file).write_bytes(raw)
    base = AutoModelForImageTextToText.from_pretrained(llava, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"is broken: the values of '.+' are not those that were written"):
        PeftModel.from_pretrained(base, str(tmp_path / "adapter"))


def test_texts_stay_with_their_embeddings(tmp_path: Path):
    """Through a configuration that is read and saved."""
    write_instruction_embeddings(tmp_path, torch.randn(2, 12), ["a", ["b", "c"]])
    SMoLoRAConfig(instruction_dim=12, default_instruction=1).save_pretrained(str(tmp_path))
    SMoLoRAConfig.from_pretrained(str(tmp_path)).save_pretrained(str(tmp_path / "again"))
    assert read_instruction_embeddings(tmp_path / "again")[1] == ["a", ["b", "c"]]


# ----------------------------------------------------------------------------------------------------- what is written


def test_layout_is_the_one_on_disk(llava: Path, tmp_path: Path):
    """The names that transformers itself writes for a LLaVA, which are those of public llava-1.5 checkpoints; loading
    leaves nothing out."""
    model, info = LlavaForConditionalGeneration.from_pretrained(llava, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    model.save_pretrained(tmp_path)
    ours, theirs = load_file(llava / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    for name in (
        "language_model.model.layers.1.mlp.gate_proj.weight",
        "language_model.model.embed_tokens.weight",
        "language_model.lm_head.weight",
        "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight",
        "vision_tower.vision_model.pre_layrnorm.weight",
        "multi_modal_projector.linear_1.weight",
    ):
        assert name in ours


def test_values_are_the_parts(llava: Path):
    """Bit for bit; leftover `inv_freq` buffers are gone."""
    ours = load_file(llava / "model.safetensors")
    language, vision = load_file(LANGUAGE / "model.safetensors"), load_file(VISION / "model.safetensors")
    projector = torch.load(PROJECTOR, weights_only=True)
    buffers = [name for name in language if "inv_freq" in name]
    assert buffers and not any("inv_freq" in name for name in ours)
    assert len(ours) == len(language) - len(buffers) + len(vision) + len(projector)
    for name, value in language.items():
        if name not in buffers:
            assert torch.equal(ours[f"language_model.{name}"][: len(value)], value)
    assert all(torch.equal(ours[f"vision_tower.{name}"], value) for name, value in vision.items())
    for index, linear in ((0, "linear_1"), (2, "linear_2")):
        for kind in ("weight", "bias"):
            value = projector[f"model.mm_projector.{index}.{kind}"]
            assert torch.equal(ours[f"multi_modal_projector.{linear}.{kind}"], value)


def test_new_tokens_are_never_chosen(llava: Path):
    """Behind the vocabulary: image, padding, and rows up to a multiple of 64, each the mean of the others."""
    config = json.loads((llava / "config.json").read_text())
    assert (config["image_token_index"], config["pad_token_id"], config["text_config"]["vocab_size"]) == (96, 97, 128)
    assert config["text_config"]["pad_token_id"] == 97 and config["image_seq_length"] == PATCHES
    assert (config["vision_feature_layer"], config["vision_feature_select_strategy"]) == (-2, "default")
    ours = load_file(llava / "model.safetensors")
    for name in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
        rows = ours[name]
        assert rows.shape == (128, 64)
        mean = rows[:WORDS].double().mean(0)
        torch.testing.assert_close(rows[WORDS:].double(), mean.expand(32, -1), rtol=1e-6, atol=1e-7)
    generation = json.loads((llava / "generation_config.json").read_text())
    assert (generation["bos_token_id"], generation["eos_token_id"], generation["pad_token_id"]) == (1, 2, 97)


def vicuna_sized(folder: Path) -> Path:
    """vicuna-7b's vocabulary, in the golden model's width."""
    shutil.copytree(LANGUAGE, folder)
    state = load_file(LANGUAGE / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        state[name] = torch.randn(32000, 64).half()
    save_file(state, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 32000, "torch_dtype": "float16"}))
    return folder


def test_vicuna_gives_the_public_layout(tmp_path: Path):
    """32000 tokens: image 32000, padding 32001, 32064 rows. One dtype when it is loaded, whatever the parts have."""
    assemble(vicuna_sized(tmp_path / "vicuna"), VISION, PROJECTOR, tmp_path / "llava")
    config = json.loads((tmp_path / "llava" / "config.json").read_text())
    assert config["image_token_index"] == 32000 and config["pad_token_id"] == 32001
    assert config["text_config"]["vocab_size"] == 32064
    with safe_open(tmp_path / "llava" / "model.safetensors", "pt") as file:
        assert file.get_slice("language_model.lm_head.weight").get_shape() == [32064, 64]
        assert file.get_slice("vision_tower.vision_model.post_layernorm.bias").get_dtype() == "F32"
    model = LlavaForConditionalGeneration.from_pretrained(tmp_path / "llava")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}
    assert str(tmp_path) not in (tmp_path / "llava" / "config.json").read_text()  # nor whose machine it was


# -------------------------------------------------------------------------------------------------- forms of the parts


def full_clip(folder: Path) -> Path:
    """The golden vision tower within a whole CLIP, with the buffer that old transformers saved."""
    config = CLIPConfig(
        vision_config=CLIPVisionConfig.from_pretrained(VISION).to_dict(),
        text_config=CLIPTextConfig(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            vocab_size=50,
            bos_token_id=1,
            eos_token_id=2,
        ).to_dict(),
        projection_dim=8,
    )
    CLIPModel(config).save_pretrained(folder)
    state = {**load_file(folder / "model.safetensors"), **load_file(VISION / "model.safetensors")}
    state["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    state["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file(state, folder / "model.safetensors")
    return folder


def in_shards(source: Path, folder: Path) -> Path:
    """`.bin` shards with an index, as older checkpoints have them."""
    shutil.copytree(source, folder)
    (folder / "model.safetensors").unlink()
    state = load_file(source / "model.safetensors")
    names, places = sorted(state), {}
    for number in range(3):
        file = f"pytorch_model-{number + 1:05d}-of-00003.bin"
        torch.save({name: state[name] for name in names[number::3]}, folder / file)
        places.update(dict.fromkeys(names[number::3], file))
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


def test_other_forms_give_the_same(llava: Path, tmp_path: Path):
    """`.bin` shards and a full CLIP: the same model; small shards of output hold the same tensors, and load."""
    assemble(
        in_shards(LANGUAGE, tmp_path / "language"),
        full_clip(tmp_path / "clip"),
        PROJECTOR,
        tmp_path / "out",
        shard_bytes=100_000,
    )
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    ours = load_file(llava / "model.safetensors")
    files = {name: load_file(tmp_path / "out" / name) for name in set(index["weight_map"].values())}
    assert len(files) > 3 and index["weight_map"].keys() == ours.keys()
    assert all(torch.equal(files[index["weight_map"][name]][name], ours[name]) for name in ours)
    assert index["metadata"]["total_size"] == sum(value.numel() * value.element_size() for value in ours.values())
    model = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert torch.equal(model.lm_head.weight, ours["language_model.lm_head.weight"])


def test_tied_embeddings(tmp_path: Path):
    """Stored once, as transformers stores them."""
    shutil.copytree(LANGUAGE, tmp_path / "language")
    state = load_file(LANGUAGE / "model.safetensors")
    del state["lm_head.weight"]
    save_file(state, tmp_path / "language" / "model.safetensors")
    config = json.loads((LANGUAGE / "config.json").read_text())
    (tmp_path / "language" / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    assemble(tmp_path / "language", VISION, PROJECTOR, tmp_path / "out")
    assert "language_model.lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")
    model = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert torch.equal(model.lm_head.weight[:WORDS], state["model.embed_tokens.weight"])


# ------------------------------------------------------------------------------------------------------------ processor


def with_tokenizer(folder: Path, tokens: int = WORDS) -> Path:
    """The golden language model with a tokenizer of characters."""
    shutil.copytree(LANGUAGE, folder)
    characters = ["<unk>", "<s>", "</s>", "\n", *map(chr, range(32, 127))][:tokens]
    vocabulary = {token: index for index, token in enumerate(characters)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>"
    )
    fast.save_pretrained(folder)
    return folder


def test_processor(tmp_path: Path):
    """Image and padding tokens behind the vocabulary, one image token a patch, pixels by Pillow, padding on the left,
    and the released prompt."""
    assemble(with_tokenizer(tmp_path / "language"), VISION, PROJECTOR, tmp_path / "llava")
    processor = load_processor(tmp_path / "llava")
    tokenizer = processor.tokenizer
    assert tokenizer.convert_tokens_to_ids(["<image>", "<pad>"]) == [96, 97]
    assert (tokenizer.pad_token, tokenizer.pad_token_id, tokenizer.padding_side) == ("<pad>", 97, "left")
    assert type(processor.image_processor) is CLIPImageProcessorPil
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 33, 3), dtype=np.uint8))
    texts = ["USER: <image>\nWhat? ASSISTANT:", "USER: <image>\nAnd what is this? ASSISTANT:"]
    batch = processor(images=[image, image], text=texts, return_tensors="pt", padding=True)
    assert (batch["input_ids"] == 96).sum(1).tolist() == [PATCHES, PATCHES] and batch["input_ids"][0, 0] == 97
    direct = CLIPImageProcessorPil.from_pretrained(VISION)(image, return_tensors="pt")["pixel_values"]
    assert torch.equal(batch["pixel_values"][:1], direct)
    model = LlavaForConditionalGeneration.from_pretrained(tmp_path / "llava").eval()
    with torch.no_grad():
        assert model(**batch).logits.isfinite().all()
    chat = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?\nIn one word."}]},
        {"role": "assistant", "content": [{"type": "text", "text": "Dog"}]},
        {"role": "user", "content": [{"type": "text", "text": "Sure?"}]},
    ]
    system = (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. "
    )
    prompt = "USER: <image>\nWhat?\nIn one word. ASSISTANT: Dog</s>USER: Sure? ASSISTANT:"
    for loaded in (processor, AutoProcessor.from_pretrained(tmp_path / "llava")):
        assert loaded.apply_chat_template(chat, add_generation_prompt=True) == system + prompt


def test_smaller_tokenizer(tmp_path: Path):
    """Where embeddings have rows that no token uses, the tokens take the first of them."""
    assemble(with_tokenizer(tmp_path / "language", tokens=90), VISION, PROJECTOR, tmp_path / "llava")
    config = json.loads((tmp_path / "llava" / "config.json").read_text())
    assert (config["image_token_index"], config["pad_token_id"], config["text_config"]["vocab_size"]) == (90, 91, 128)
    assert load_processor(tmp_path / "llava").image_token_id == 90


def test_larger_tokenizer(tmp_path: Path):
    with pytest.raises(ValueError, match="a tokenizer of 97 tokens, and embeddings of 96"):
        assemble(with_tokenizer(tmp_path / "language", tokens=97), VISION, PROJECTOR, tmp_path / "llava")


def test_without_preprocessor_config(tmp_path: Path):
    """The tower's own image size then."""
    shutil.copytree(VISION, tmp_path / "vision")
    (tmp_path / "vision" / "preprocessor_config.json").unlink()
    assemble(LANGUAGE, tmp_path / "vision", PROJECTOR, tmp_path / "llava")
    images = CLIPImageProcessorPil.from_pretrained(tmp_path / "llava")
    assert (images.crop_size.height, images.size.shortest_edge) == (28, 28)


# -------------------------------------------------------------------------------------------------------------- memory


def resident() -> int:
    """Bytes of memory that are the process's own, and not files mapped into it."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) * 1024


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_memory(file: str, tmp_path: Path):
    """Weights go from file to file: what the process itself holds stays far below one copy of them."""
    state = load_file(LANGUAGE / "model.safetensors")
    for name in state:
        if ".mlp." in name:
            state[name] = torch.zeros(*((64, 64_000) if "down" in name else (64_000, 64)))
    size = sum(value.numel() * value.element_size() for value in state.values())
    config = json.loads((LANGUAGE / "config.json").read_text())
    (tmp_path / "language").mkdir()
    (tmp_path / "language" / "config.json").write_text(json.dumps({**config, "intermediate_size": 64_000}))
    (save_file if file.endswith("safetensors") else torch.save)(state, tmp_path / "language" / file)
    del state
    assemble(LANGUAGE, VISION, PROJECTOR, tmp_path / "first")  # what configurations and the meta model cost
    before, peak, done = resident(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, resident())

    thread = threading.Thread(target=watch)
    thread.start()
    assemble(tmp_path / "language", VISION, PROJECTOR, tmp_path / "out", shard_bytes=20_000_000)
    done.set()
    thread.join()
    assert size > 95e6 and peak > 0 and peak - before < 0.25 * size, (peak, before, size)


# ----------------------------------------------------------------------------------------------------- what is refused


def changed(folder: Path, source: Path, change) -> Path:
    """A part with one change to its tensors."""
    shutil.copytree(source, folder)
    state = load_file(source / "model.safetensors")
    save_file({name: value.contiguous() for name, value in change(state).items()}, folder / "model.safetensors")
    return folder


def without(name: str):
    return lambda state: {key: value for key, value in state.items() if key != name}


def replacing(name: str, change):
    return lambda state: {**state, name: change(state[name])}


UP, Q = "model.layers.1.mlp.up_proj.weight", "vision_model.encoder.layers.0.self_attn.q_proj.weight"
BROKEN = [
    ("language", without(UP), ["language", "lacks", "layers.1.mlp.up_proj.weight"]),
    ("language", without("lm_head.weight"), ["language", "lacks", "lm_head.weight"]),
    ("language", lambda s: {**s, "model.layers.2.norm.weight": torch.ones(64)}, ["layers.2.norm.weight", "no place"]),
    ("language", lambda s: {**s, "score.weight": torch.ones(2, 64)}, ["score.weight", "no place"]),
    ("language", replacing(UP, lambda t: t[:-1]), [UP, "(112, 64)", "(111, 64)"]),
    ("language", replacing(UP, lambda t: t[:0]), [UP, "(0, 64)"]),
    ("language", replacing("model.embed_tokens.weight", lambda t: t[:90]), ["embed_tokens", "(96, 64)", "(90, 64)"]),
    ("language", replacing(UP, lambda t: t.to(torch.int8)), [UP, "floating point", "torch.int8"]),
    ("vision", without(Q), ["vision", "lacks", "q_proj.weight"]),
    ("vision", replacing(Q, lambda t: t.mT[:5]), ["q_proj.weight", "(48, 48)", "(5, 48)"]),
    ("vision", lambda s: {**s, "vision_model.extra": torch.ones(1)}, ["vision_model.extra", "no place"]),
]


@pytest.mark.parametrize(("part", "change", "words"), BROKEN, ids=[f"{p} {w[-1]}" for p, _, w in BROKEN])
def test_broken_parts(part: str, change, words: list[str], tmp_path: Path):
    """By name, before anything is written."""
    sources = {"language": LANGUAGE, "vision": VISION}
    sources[part] = changed(tmp_path / "part", sources[part], change)
    with pytest.raises(ValueError) as raised:
        assemble(sources["language"], sources["vision"], PROJECTOR, tmp_path / "out")
    assert all(word in str(raised.value) for word in words), str(raised.value)
    assert [p.name for p in tmp_path.iterdir()] == ["part"]


def test_broken_projectors(tmp_path: Path):
    state = torch.load(PROJECTOR, weights_only=True)
    cases = [
        (without("model.mm_projector.2.bias"), ["projector", "lacks", "linear_2.bias"]),
        (replacing("model.mm_projector.0.weight", lambda t: t.mT.contiguous()), ["linear_1.weight", "(64, 48)"]),
        (lambda s: {**s, "model.mm_projector.4.weight": torch.ones(1)}, ["mm_projector.4.weight", "no place"]),
        (lambda s: {}, ["projector", "lacks"]),
    ]
    for change, words in cases:
        torch.save(change(dict(state)), tmp_path / "p.bin")
        with pytest.raises(ValueError) as raised:
            assemble(LANGUAGE, VISION, tmp_path / "p.bin", tmp_path / "out")
        assert all(word in str(raised.value) for word in words), str(raised.value)
    raw = bytearray(PROJECTOR.read_bytes())
    raw[len(raw) // 2] ^= 1
    (tmp_path / "p.bin").write_bytes(raw)
    with pytest.raises(ValueError, match=r"'model\.mm_projector\.2\.weight'"):
        assemble(LANGUAGE, VISION, tmp_path / "p.bin", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("part", "changes", "words"),
    [
        ("language", dict(num_attention_heads=5), "number of attention heads"),
        ("language", dict(hidden_act="nope"), "nope"),
        ("language", dict(model_type="t5"), "LLaVA"),
        ("language", dict(model_type="none"), "none"),
        ("vision", dict(patch_size=0), "ZeroDivisionError"),
    ],
)
def test_wrong_configurations(part: str, changes: dict, words: str, tmp_path: Path):
    """Whatever transformers makes of them, the command ends with one error."""
    sources = {"language": LANGUAGE, "vision": VISION}
    shutil.copytree(sources[part], tmp_path / "part")
    config = json.loads((tmp_path / "part" / "config.json").read_text())
    (tmp_path / "part" / "config.json").write_text(json.dumps({**config, **changes}))
    sources[part] = tmp_path / "part"
    with pytest.raises(ValueError, match=words):
        assemble(sources["language"], sources["vision"], PROJECTOR, tmp_path / "out")


def test_wrong_folders(tmp_path: Path, capsys: pytest.CaptureFixture):
    """Parts mixed up, missing, or an output that is there."""
    with pytest.raises(ValueError, match="vision must be a CLIP model or its vision half, got model_type 'llama'"):
        assemble(LANGUAGE, LANGUAGE, PROJECTOR, tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="language must be a folder with a config"):
        assemble(tmp_path / "none", VISION, PROJECTOR, tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="projector"):
        assemble(LANGUAGE, VISION, tmp_path / "projector.bin", tmp_path / "out")
    command = ["assemble", "--language", LANGUAGE, "--vision", VISION, "--projector", PROJECTOR, "--output"]
    assert cli.main([*map(str, command), str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert "it has no tokenizer" in capsys.readouterr().err
    assert cli.main([*map(str, command), str(tmp_path / "out")]) == 1
    assert "output must be a new or empty folder" in capsys.readouterr().err
