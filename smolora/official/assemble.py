"""Assemble a LLaVA from three parts: a language model, a CLIP vision tower, and the projector between them.

First-stage LLaVA, the base of the released adapters, is distributed in these parts. The result is a checkpoint of
transformers' `LlavaForConditionalGeneration`, with the names that public llava-1.5 checkpoints have on disk.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor

from ..data.prompts import CHAT_TEMPLATE
from ..extras import require_extra
from ..instructions.texts import IMAGE_TOKEN
from ..io.files import atomic_folder, join_names
from ..io.tensors import read_model, read_tensors, save_tensors
from .names import PROJECTOR

if TYPE_CHECKING:  # transformers' models take seconds to import
    from transformers import CLIPImageProcessorPil, LlavaConfig, LlavaProcessor, PreTrainedTokenizerBase

PAD_TOKEN = "<pad>"
VOCABULARY_MULTIPLE = 64  # as in public llava-1.5 checkpoints: 32000 tokens, image and padding make 32064 rows
SHARD_BYTES = 5 * 10**9
PROJECTOR_TENSOR = re.compile(r"(?:.+\.)?(?P<linear>mm_projector\.[02])\.(?P<parameter>weight|bias)")
EMBEDDINGS = ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight")  # a row for each token
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")


# --------------------------------------------------------------------------------------------------------- the parts


def _language_name(name: str) -> str | None:
    """Return the name on disk of a language model's tensor; None for a buffer that older transformers saved."""
    return None if name.endswith("rotary_emb.inv_freq") else f"language_model.{name}"


def _vision_name(name: str) -> str | None:
    """Return the name on disk of a CLIP tensor.

    None for the text half, the projections into CLIP's common space, and a buffer that older transformers saved.
    """
    if name.startswith(("text_model.", "text_projection.", "visual_projection.")) or name == "logit_scale":
        return None
    if name.endswith("embeddings.position_ids"):
        return None
    return f"vision_tower.vision_model.{name.removeprefix('vision_model.')}"


def _projector_name(name: str) -> str | None:
    """Return the name on disk of a tensor of the projector (Linear, GELU, Linear)."""
    match = PROJECTOR_TENSOR.fullmatch(name)
    return f"{PROJECTOR[match['linear']]}.{match['parameter']}" if match else name


def _rename(tensors: Mapping[str, Tensor], rename: Callable[[str], str | None]) -> dict[str, Tensor]:
    return {new: tensor for name, tensor in tensors.items() if (new := rename(name)) is not None}


def _make_config(language: Path, vision: Path) -> LlavaConfig:
    """Make the LLaVA's configuration, still with the language model's vocabulary."""
    from transformers import AutoConfig, LlavaConfig

    configs = {}
    for argument, folder in (("language", language), ("vision", vision)):
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"{argument} must be a folder with a config.json, got {folder}")
        configs[argument] = AutoConfig.from_pretrained(folder)
    text, clip = configs["language"], configs["vision"]
    if clip.model_type == "clip":
        clip = clip.vision_config
    if clip.model_type != "clip_vision_model":
        raise ValueError(f"vision must be a CLIP model or its vision half, got model_type {clip.model_type!r}")
    config = LlavaConfig(
        vision_config=clip,
        text_config=text,
        image_seq_length=(clip.image_size // clip.patch_size) ** 2,
        projector_hidden_act="gelu",
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    config.architectures = ["LlavaForConditionalGeneration"]
    for part in (config, clip):  # the parts must be loaded in one dtype to work together
        part.dtype = text.dtype
    for part in (text, clip):
        part._name_or_path = ""  # do not save the paths of this machine
    return config


def _expected_shapes(config: LlavaConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a LLaVA's tensors by their names on disk; the model is built on the meta device."""
    from transformers import LlavaForConditionalGeneration

    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    shapes: dict[str, tuple[int, ...]] = {}
    for name, parameter in model.named_parameters():
        if name.startswith("model.vision_tower."):
            name = f"vision_tower.vision_model.{name.removeprefix('model.vision_tower.').removeprefix('vision_model.')}"
        elif name.startswith("model.language_model."):
            name = f"language_model.model.{name.removeprefix('model.language_model.')}"
        elif name.startswith("lm_head."):
            name = f"language_model.{name}"
        else:
            name = name.removeprefix("model.")
        shapes[name] = tuple(parameter.shape)
    return shapes


def _check(tensors: dict[str, Tensor], shapes: dict[str, tuple[int, ...]], parts: dict[str, tuple[str, Path]]) -> None:
    """Check that the parts have all tensors of the model and no others.

    Raises:
        ValueError: a tensor is missing, unknown, of another shape, or of integers.
    """
    for argument, (prefix, path) in parts.items():
        missing = {name for name in shapes if name.startswith(prefix)} - tensors.keys()
        if missing:
            raise ValueError(f"{argument}: {path} lacks {join_names(missing)} (by their names in a LLaVA)")
    unknown = tensors.keys() - shapes.keys()
    if unknown:
        raise ValueError(
            f"language, vision or projector have what a LLaVA of these sizes has no place for: {join_names(unknown)}"
        )
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != shapes[name] or not tensor.is_floating_point():
            raise ValueError(
                f"{name!r} must be floating point of shape {shapes[name]}, got {tensor.dtype} of {tuple(tensor.shape)}"
            )


# ------------------------------------------------------------------------------------------------------- the vocabulary


def _load_tokenizer(language: Path, rows: int) -> PreTrainedTokenizerBase | None:
    """Load the language model's tokenizer and append the image and padding tokens; None if it has no files."""
    if not any((language / name).is_file() for name in TOKENIZER_FILES):
        return None
    from transformers import AddedToken, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(language, padding_side="left")  # as generation in batches needs it
    if len(tokenizer) > rows:
        raise ValueError(f"language: {language} has a tokenizer of {len(tokenizer)} tokens, and embeddings of {rows}")
    tokenizer.add_tokens(AddedToken(IMAGE_TOKEN, special=True, normalized=False), special_tokens=True)
    tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
    return tokenizer


def _enlarge(weight: Tensor, rows: int) -> Tensor:
    """Append rows to embeddings, each the mean of the existing rows.

    The logit of such a token is a mean of logits, so greedy decoding never picks it.
    """
    mean = torch.zeros(weight.shape[1], dtype=torch.float64)
    for block in weight.split(4096):  # in blocks: all of it in double would be the largest tensor in memory
        mean += block.sum(0, dtype=torch.float64)
    grown = weight.new_empty(rows, weight.shape[1])
    grown[: len(weight)] = weight
    grown[len(weight) :] = mean / len(weight)
    return grown


# ------------------------------------------------------------------------------------------------------------ the files


def _write_weights(folder: Path, tensors: dict[str, Tensor], rows: int, shard_bytes: int) -> None:
    """Write all tensors, a shard at a time.

    The tensors are mapped from their files, so no more than the two embeddings and one shard are in memory.
    """
    shapes = {  # on the meta device, where a tensor takes no memory
        name: torch.empty(
            (rows, tensor.shape[1]) if name in EMBEDDINGS else tensor.shape, dtype=tensor.dtype, device="meta"
        )
        for name, tensor in sorted(tensors.items())
    }
    split = split_torch_state_dict_into_shards(shapes, max_shard_size=shard_bytes)
    for file, names in split.filename_to_tensors.items():
        shard = {name: _enlarge(tensors[name], rows) if name in EMBEDDINGS else tensors[name] for name in names}
        save_tensors(folder / file, {name: tensor.contiguous() for name, tensor in shard.items()}, {"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True), "utf-8")


def _load_image_processor(vision: Path, config: LlavaConfig) -> CLIPImageProcessorPil:
    from transformers import CLIPImageProcessorPil

    if (vision / "preprocessor_config.json").is_file():
        return CLIPImageProcessorPil.from_pretrained(vision)
    size = config.vision_config.image_size
    return CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})


def load_processor(folder: str | Path) -> LlavaProcessor:
    """Load a LLaVA's processor, with Pillow for the images.

    `AutoProcessor.from_pretrained` would take torchvision if it is installed, whose resizing gives other pixels.

    Args:
        folder: a LLaVA that `assemble` or transformers saved.
    """
    from transformers import CLIPImageProcessorPil, LlavaProcessor

    processor = LlavaProcessor.from_pretrained(folder)
    if type(processor.image_processor) is not CLIPImageProcessorPil:
        processor.image_processor = CLIPImageProcessorPil.from_pretrained(folder)
    return processor


def assemble(
    language: str | Path,
    vision: str | Path,
    projector: str | Path,
    output: str | Path,
    *,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Assemble a LLaVA from three parts and write it.

    The image token and a padding token follow the language model's own vocabulary, and the embeddings grow to a
    multiple of 64 rows: for vicuna-7b, tokens 32000 and 32001 and 32064 rows, as in public llava-1.5 checkpoints. All
    other tensors are copied bit for bit, each in its own dtype, from file to file.

    Args:
        language: folder of a causal language model (`vicuna-7b-v1.5`), safetensors or `.bin`, sharded or not, with or
            without a tokenizer.
        vision: folder of a CLIP model, or of its vision half (`clip-vit-large-patch14-336`).
        projector: `mm_projector.bin`, the two linear layers.
        output: a new or empty folder, written atomically.
        shard_bytes: largest size of a file of weights, unless a single tensor is larger.

    Raises:
        MissingExtraError: Pillow, which processes images, is not installed.
        FileNotFoundError, FileExistsError: a part is missing, or `output` is not empty.
        ValueError: a part is broken, or does not fit the others; the message names the tensor.
    """
    require_extra("llava", "PIL", user="assemble")
    from transformers import GenerationConfig, LlavaProcessor

    language, vision, projector = Path(language), Path(vision), Path(projector)
    try:
        config = _make_config(language, vision)
        shapes = _expected_shapes(config)
    except (OSError, ValueError):
        raise
    except Exception as error:  # a wrong configuration may raise anything
        raise ValueError(
            f"language and vision have configurations of which transformers cannot make a LLaVA: "
            f"{type(error).__name__}: {error}"
        ) from error
    if config.tie_word_embeddings:
        shapes.pop(EMBEDDINGS[1], None)
    tensors = _rename(read_model(language, "language"), _language_name)
    if config.tie_word_embeddings:
        tensors.pop(EMBEDDINGS[1], None)
    tensors |= _rename(read_model(vision, "vision"), _vision_name)
    tensors |= _rename(read_tensors(projector)[0], _projector_name)
    parts = {
        "language": ("language_model.", language),
        "vision": ("vision_tower.", vision),
        "projector": ("multi_modal_projector.", projector),
    }
    _check(tensors, shapes, parts)

    known = config.text_config.vocab_size
    tokenizer = _load_tokenizer(language, known)
    image, pad = known, known + 1
    if tokenizer is not None:
        image, pad = tokenizer.convert_tokens_to_ids([IMAGE_TOKEN, PAD_TOKEN])
    rows = max(known, math.ceil((max(image, pad) + 1) / VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE)
    config.image_token_index = image
    config.text_config.vocab_size = rows
    config.pad_token_id = config.text_config.pad_token_id = pad
    images = _load_image_processor(vision, config)

    with atomic_folder(output) as folder:
        _write_weights(folder, tensors, rows, shard_bytes)
        config.save_pretrained(folder)
        ends = {name: getattr(config.text_config, name) for name in ("bos_token_id", "eos_token_id")}
        GenerationConfig(**ends, pad_token_id=pad).save_pretrained(folder)
        if tokenizer is None:
            images.save_pretrained(folder)
        else:
            LlavaProcessor(
                images,
                tokenizer,
                patch_size=config.vision_config.patch_size,
                vision_feature_select_strategy="default",
                chat_template=CHAT_TEMPLATE,
                num_additional_image_tokens=1,
            ).save_pretrained(folder)
