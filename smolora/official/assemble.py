"""Assemble a LLaVA from three parts: a language model, a CLIP vision tower, and the projector between them.

First-stage LLaVA, the base of the released adapters, is distributed in these parts. The result is a checkpoint of
transformers' `LlavaForConditionalGeneration`, with the names that public llava-1.5 checkpoints have on disk.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.prompts import CHAT_TEMPLATE
from ..extras import require_extra
from ..io.files import atomic_folder, join_names
from ..io.tensors import read_model, read_tensors
from .names import PROJECTOR
from .parts import (
    EMBEDDINGS,
    SHARD_BYTES,
    Part,
    check_missing,
    check_shapes,
    configuration_errors,
    extend_vocabulary,
    language_name,
    parameter_shapes,
    read_config,
    rename,
    write_model,
)

if TYPE_CHECKING:  # transformers' models take seconds to import
    from transformers import CLIPImageProcessorPil, LlavaConfig, LlavaProcessor

PROJECTOR_TENSOR = re.compile(r"(?:.+\.)?(?P<linear>mm_projector\.[02])\.(?P<parameter>weight|bias)")


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


def _make_config(language: Path, vision: Path) -> LlavaConfig:
    """Make the LLaVA's configuration, still with the language model's vocabulary."""
    from transformers import LlavaConfig

    text, clip = read_config(language, "language"), read_config(vision, "vision")
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


def _name_on_disk(name: str) -> str:
    """Return the name on disk of a LLaVA's parameter."""
    if name.startswith("model.vision_tower."):
        return f"vision_tower.vision_model.{name.removeprefix('model.vision_tower.').removeprefix('vision_model.')}"
    if name.startswith("model.language_model."):
        return f"language_model.model.{name.removeprefix('model.language_model.')}"
    return f"language_model.{name}" if name.startswith("lm_head.") else name.removeprefix("model.")


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
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

    language, vision, projector = Path(language), Path(vision), Path(projector)
    with configuration_errors("language and vision", "LLaVA"):
        config = _make_config(language, vision)
        shapes = parameter_shapes(lambda: LlavaForConditionalGeneration(config))
    shapes = {_name_on_disk(name): shape for name, shape in shapes.items()}
    tensors = rename(read_model(language, "language"), language_name)
    if config.tie_word_embeddings:
        shapes.pop(EMBEDDINGS[1], None)
        tensors.pop(EMBEDDINGS[1], None)
    tensors |= rename(read_model(vision, "vision"), _vision_name)
    tensors |= rename(read_tensors(projector)[0], _projector_name)
    parts = {
        "language": Part(language, ("language_model.",)),
        "vision": Part(vision, ("vision_tower.",)),
        "projector": Part(projector, ("multi_modal_projector.",)),
    }
    check_missing(tensors, shapes, parts, "LLaVA")
    unknown = tensors.keys() - shapes.keys()
    if unknown:
        raise ValueError(
            f"language, vision or projector have what a LLaVA of these sizes has no place for: {join_names(unknown)}"
        )
    check_shapes(tensors, shapes)

    tokenizer = extend_vocabulary(config, language)
    processor: Any = _load_image_processor(vision, config)
    if tokenizer is not None:
        processor = LlavaProcessor(
            processor,
            tokenizer,
            patch_size=config.vision_config.patch_size,
            vision_feature_select_strategy="default",
            chat_template=CHAT_TEMPLATE,
            num_additional_image_tokens=1,
        )
    with atomic_folder(output) as folder:
        write_model(folder, tensors, config, processor, shard_bytes)
