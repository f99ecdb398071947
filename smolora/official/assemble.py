"""One LLaVA of its three parts: a language model, a CLIP vision tower, and the projector between them.

First-stage LLaVA, which the released adapters sit on, is distributed in these parts. What is written is a checkpoint of
transformers' `LlavaForConditionalGeneration`, with the names that public llava-1.5 checkpoints have on disk.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..io.files import atomic_folder
from ..io.tensors import named, read_model, read_tensors, save_tensors

if TYPE_CHECKING:  # transformers' models take seconds to import
    from transformers import CLIPImageProcessorPil, LlavaConfig, LlavaProcessor, PreTrainedTokenizerBase

IMAGE_TOKEN, PAD_TOKEN = "<image>", "<pad>"
VOCABULARY_MULTIPLE = 64  # as in public llava-1.5 checkpoints: 32000 tokens, image and padding make 32064 rows
SHARD_BYTES = 5 * 10**9
PROJECTOR = re.compile(r"(?:.+\.)?mm_projector\.(?P<linear>[02])\.(?P<parameter>weight|bias)")
LINEARS = {"0": "linear_1", "2": "linear_2"}
EMBEDDINGS = ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight")  # a row for each token
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
# the prompt of the released benchmark (vicuna_v1); a conversation that starts with a system message brings its own
CHAT_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. {% endif %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}USER: {% elif message['role'] == 'assistant' %}ASSISTANT: {% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}{% endif %}"
    "{{ '</s>' if message['role'] == 'assistant' else ' ' }}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


# --------------------------------------------------------------------------------------------------------- the parts


def _language_name(name: str) -> str | None:
    """The name on disk of a language model's tensor; None for a buffer that older transformers saved."""
    return None if name.endswith("rotary_emb.inv_freq") else f"language_model.{name}"


def _vision_name(name: str) -> str | None:
    """The name on disk of a CLIP tensor; None for the text half, the projections into CLIP's common space, and an old
    buffer."""
    if name.startswith(("text_model.", "text_projection.", "visual_projection.")) or name == "logit_scale":
        return None
    if name.endswith("embeddings.position_ids"):
        return None
    return f"vision_tower.vision_model.{name.removeprefix('vision_model.')}"


def _projector_name(name: str) -> str | None:
    """The name on disk of a projector's tensor (Linear, GELU, Linear)."""
    match = PROJECTOR.fullmatch(name)
    return f"multi_modal_projector.{LINEARS[match['linear']]}.{match['parameter']}" if match else name


def _renamed(tensors: Mapping[str, Tensor], rename: Callable[[str], str | None]) -> dict[str, Tensor]:
    return {new: tensor for name, tensor in tensors.items() if (new := rename(name)) is not None}


def _configuration(language: Path, vision: Path) -> LlavaConfig:
    """The LLaVA's configuration, its vocabulary still that of the language model."""
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
        vision_config=clip, text_config=text, image_seq_length=(clip.image_size // clip.patch_size) ** 2,
        projector_hidden_act="gelu", vision_feature_layer=-2, vision_feature_select_strategy="default",
    )  # fmt: skip
    config.architectures = ["LlavaForConditionalGeneration"]
    for part in (config, clip):  # one dtype for all when it is loaded: halves of two would not fit together
        part.dtype = text.dtype
    for part in (text, clip):
        part._name_or_path = ""  # where the parts lay is nobody's affair
    return config


def _expected_shapes(config: LlavaConfig) -> dict[str, tuple[int, ...]]:
    """The shapes of all tensors of a LLaVA by their names on disk, from a model without memory."""
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


def _check(tensors: dict[str, Tensor], shapes: dict[str, tuple[int, ...]], parts: dict[str, Path]) -> None:
    """Refuse parts that are not exactly what the model needs, before anything is written."""
    for argument, (prefix, path) in parts.items():
        missing = {name for name in shapes if name.startswith(prefix)} - tensors.keys()
        if missing:
            raise ValueError(f"{argument}: {path} lacks {named(missing)} (by their names in a LLaVA)")
    unknown = tensors.keys() - shapes.keys()
    if unknown:
        raise ValueError(f"language, vision or projector have what a LLaVA of these sizes has no place for: "
                         f"{named(unknown)}")  # fmt: skip
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != shapes[name] or not tensor.is_floating_point():
            raise ValueError(
                f"{name!r} must be floating point of shape {shapes[name]}, got {tensor.dtype} of {tuple(tensor.shape)}"
            )


# ------------------------------------------------------------------------------------------------------- the vocabulary


def _tokenizer(language: Path, rows: int) -> PreTrainedTokenizerBase | None:
    """The language model's tokenizer with image and padding tokens behind its own; None where it has no files."""
    if not any((language / name).is_file() for name in TOKENIZER_FILES):
        return None
    from transformers import AddedToken, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(language, padding_side="left")  # as generation in batches needs it
    if len(tokenizer) > rows:
        raise ValueError(f"language: {language} has a tokenizer of {len(tokenizer)} tokens, and embeddings of {rows}")
    tokenizer.add_tokens(AddedToken(IMAGE_TOKEN, special=True, normalized=False), special_tokens=True)
    tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
    return tokenizer


def _enlarged(weight: Tensor, rows: int) -> Tensor:
    """Embeddings with more rows: each is the mean of those there are.

    So no new token's logit is above all others', and greedy decoding never picks one.
    """
    mean = torch.zeros(weight.shape[1], dtype=torch.float64)
    for block in weight.split(4096):  # a double copy of everything would be larger than the model's largest tensor
        mean += block.sum(0, dtype=torch.float64)
    grown = weight.new_empty(rows, weight.shape[1])
    grown[: len(weight)] = weight
    grown[len(weight) :] = mean / len(weight)
    return grown


# ------------------------------------------------------------------------------------------------------------ the files


def _shards(sizes: Mapping[str, int], limit: int) -> Iterator[list[str]]:
    """Names in groups of at most `limit` bytes, in their order; a larger tensor is alone."""
    group: list[str] = []
    held = 0
    for name, size in sizes.items():
        if group and held + size > limit:
            yield group
            group, held = [], 0
        group.append(name)
        held += size
    yield group


def _write_weights(folder: Path, tensors: dict[str, Tensor], rows: int, shard_bytes: int) -> None:
    """Write all tensors, a shard at a time; they are mapped from their files, so none of them is held for long."""

    def size(name: str) -> int:
        shape = tensors[name].shape
        return (rows * shape[1] if name in EMBEDDINGS else math.prod(shape)) * tensors[name].element_size()

    sizes = {name: size(name) for name in sorted(tensors)}
    groups = list(_shards(sizes, shard_bytes))
    places = {}
    for number, group in enumerate(groups, 1):
        file = "model.safetensors" if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        shard = {
            name: _enlarged(tensors[name], rows) if name in EMBEDDINGS else tensors[name].contiguous() for name in group
        }
        save_tensors(folder / file, shard, {"format": "pt"})
        places.update(dict.fromkeys(group, file))
    if len(groups) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True), "utf-8")


def _image_processor(vision: Path, config: LlavaConfig) -> CLIPImageProcessorPil:
    from transformers import CLIPImageProcessorPil

    if (vision / "preprocessor_config.json").is_file():
        return CLIPImageProcessorPil.from_pretrained(vision)
    size = config.vision_config.image_size
    return CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})


def load_processor(folder: str | Path) -> LlavaProcessor:
    """A LLaVA's processor with images processed by Pillow, so that torchvision's presence changes nothing.

    `AutoProcessor.from_pretrained` takes torchvision where it finds it, whose resizing gives other pixels.

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
    """Write one LLaVA of three parts.

    The image token and a padding token come behind the language model's own vocabulary, and the embeddings grow to a
    multiple of 64 rows: for vicuna-7b, tokens 32000 and 32001 and 32064 rows, as in public llava-1.5 checkpoints. All
    other tensors stay bit for bit what they are, each in its own dtype. They are copied from file to file, so that no
    more than the two embeddings and what the system caches is ever in memory.

    Args:
        language: folder of a causal language model (`vicuna-7b-v1.5`), safetensors or `.bin`, in shards or not; its
            tokenizer's files may be there too.
        vision: folder of a CLIP model, or of its vision half (`clip-vit-large-patch14-336`).
        projector: `mm_projector.bin`, the two linear layers.
        output: a new or empty folder, written as a whole or not at all.
        shard_bytes: size of a file of weights, at most (unless one tensor is larger).

    Raises:
        FileNotFoundError, FileExistsError: a part is not there, or `output` has something in it.
        ValueError: a part is broken, or does not fit the others; the message names the tensor.
    """
    from transformers import GenerationConfig, LlavaProcessor

    language, vision, projector = Path(language), Path(vision), Path(projector)
    try:
        config = _configuration(language, vision)
        shapes = _expected_shapes(config)
    except (OSError, ValueError):
        raise
    except Exception as error:  # a configuration of nonsense raises anything
        raise ValueError(
            f"language and vision have configurations of which transformers cannot make a LLaVA: "
            f"{type(error).__name__}: {error}"
        ) from error
    if config.tie_word_embeddings:
        shapes.pop(EMBEDDINGS[1], None)
    tensors = _renamed(read_model(language, "language"), _language_name)
    if config.tie_word_embeddings:
        tensors.pop(EMBEDDINGS[1], None)
    tensors |= _renamed(read_model(vision, "vision"), _vision_name)
    tensors |= _renamed(read_tensors(projector)[0], _projector_name)
    parts = {
        "language": ("language_model.", language), "vision": ("vision_tower.", vision),
        "projector": ("multi_modal_projector.", projector),
    }  # fmt: skip
    _check(tensors, shapes, parts)

    known = config.text_config.vocab_size
    tokenizer = _tokenizer(language, known)
    image, pad = known, known + 1
    if tokenizer is not None:
        image, pad = tokenizer.convert_tokens_to_ids([IMAGE_TOKEN, PAD_TOKEN])
    rows = max(known, math.ceil((max(image, pad) + 1) / VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE)
    config.image_token_index = image
    config.text_config.vocab_size = rows
    config.pad_token_id = config.text_config.pad_token_id = pad
    images = _image_processor(vision, config)

    with atomic_folder(output) as folder:
        _write_weights(folder, tensors, rows, shard_bytes)
        config.save_pretrained(folder)
        ends = {name: getattr(config.text_config, name) for name in ("bos_token_id", "eos_token_id")}
        GenerationConfig(**ends, pad_token_id=pad).save_pretrained(folder)
        if tokenizer is None:
            images.save_pretrained(folder)
        else:
            LlavaProcessor(
                images, tokenizer, patch_size=config.vision_config.patch_size, vision_feature_select_strategy="default",
                chat_template=CHAT_TEMPLATE, num_additional_image_tokens=1,
            ).save_pretrained(folder)  # fmt: skip
