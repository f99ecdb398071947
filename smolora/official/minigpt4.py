"""Assemble a MiniGPT-4 from its four parts: a Vicuna, EVA's ViT, BLIP-2's Q-Former and the projection.

MiniGPT-4 is distributed in these parts, and its code puts them together each time it starts. The result is a checkpoint
of transformers' `Blip2ForConditionalGeneration`. It computes what the released code (Vision-CAIR/MiniGPT-4) computes,
up to one constant: the LayerNorm after the ViT has an epsilon of 1e-5 there and of 1e-6 here, since transformers has
one for all of the tower. That changes its output by at most 4.5e-6 of itself, divided by the variance of its input.

Only the version with Vicuna can be expressed. The one with Llama 2 has no Q-Former and projects four patches at a time.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..extras import require_extra
from ..instructions.texts import IMAGE_TOKEN
from ..io.files import atomic_folder, join_names
from ..io.tensors import read_model, read_tensors
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
    from transformers import Blip2Config

ENTRY = "model"  # of the released pickles, beside the state of the optimiser
# Patterns of released names and what replaces them, one after the other. The ViT has a file of its own, where its names
# begin at "cls_token", "pos_embed", "patch_embed" and "blocks".
NAMES = (
    (r"^(?=cls_token$|pos_embed$|patch_embed\.|blocks\.)", "visual_encoder."),
    (r"^visual_encoder\.cls_token$", "vision_model.embeddings.class_embedding"),
    (r"^visual_encoder\.pos_embed$", "vision_model.embeddings.position_embedding"),
    (r"^visual_encoder\.patch_embed\.proj\.", "vision_model.embeddings.patch_embedding."),
    (r"^visual_encoder\.blocks\.(\d+)\.", r"vision_model.encoder.layers.\1."),
    (r"^(vision_model\..*)\.norm([12])\.", r"\1.layer_norm\2."),
    (r"^(vision_model\..*)\.attn\.proj\.", r"\1.self_attn.projection."),
    (r"^(vision_model\..*)\.attn\.", r"\1.self_attn."),
    (r"^ln_vision\.", "vision_model.post_layernorm."),
    (r"^Qformer\.bert\.embeddings\.LayerNorm\.", "qformer.layernorm."),
    (r"^Qformer\.bert\.encoder\.", "qformer.encoder."),
    (r"^(qformer\..*attention)\.self\.", r"\1.attention."),
    (r"^llama_proj\.", "language_projection."),
    (r"^llama_model\.", "language_model."),
)
# The released prompt. An answer ends with the mark that the next turn begins with.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}###Human: {% elif message['role'] == 'assistant' %}###Assistant: {% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}<Img>IMAGE</Img> {% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}{% endif %}"
    "{% if message['role'] == 'user' %} {% elif message['role'] == 'assistant' and loop.last %}###{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}###Assistant: {% endif %}"
)


def chat_template(queries: int) -> str:
    """Return the released prompt as a chat template, with an image token for each of an image's queries."""
    return CHAT_TEMPLATE.replace("IMAGE", IMAGE_TOKEN * queries)


def _name_on_disk(name: str) -> str | None:
    """Return the name in a Blip2 of a tensor of the released files; None for a buffer of the language model."""
    for pattern, replacement in NAMES:
        name = re.sub(pattern, replacement, name)
    return None if name.endswith("rotary_emb.inv_freq") else name


def _join_biases(released: dict[str, Tensor]) -> dict[str, Tensor]:
    """Replace the biases of queries and values by one for queries, keys and values. Keys have none."""
    joined = dict(released)
    for name in released:
        attention = name.removesuffix("q_bias")
        if name.endswith(".attn.q_bias") and f"{attention}v_bias" in released:
            query, value = joined.pop(name), joined.pop(f"{attention}v_bias")
            joined[f"{attention}qkv.bias"] = torch.cat([query, torch.zeros_like(value), value])
    return joined


def released_config() -> Blip2Config:
    """Configure the ViT and the Q-Former as released: ViT-g/14 at 224 with 39 layers, 12 layers and 32 queries.

    Both are frozen there and never in training mode, so the Q-Former has no dropout.
    """
    from transformers import Blip2Config, Blip2QFormerConfig, Blip2VisionConfig

    return Blip2Config(
        vision_config=Blip2VisionConfig(),
        qformer_config=Blip2QFormerConfig(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
        num_query_tokens=32,
    )


def _make_config(language: Path, sizes: Blip2Config) -> Blip2Config:
    """Make the MiniGPT-4's configuration, still with the language model's vocabulary."""
    from transformers import Blip2Config

    text = read_config(language, "language")
    if text.model_type != "llama":
        raise ValueError(f"language must be a Vicuna, of model_type 'llama', got model_type {text.model_type!r}")
    config = Blip2Config(
        vision_config=sizes.vision_config.to_dict(),
        qformer_config=sizes.qformer_config.to_dict(),
        text_config=text,
        num_query_tokens=sizes.num_query_tokens,
    )
    config.architectures = ["Blip2ForConditionalGeneration"]
    for part in (config, config.vision_config, config.qformer_config):  # loaded in one dtype
        part.dtype = text.dtype
    text._name_or_path = ""  # do not save the paths of this machine
    return config


def assemble_minigpt4(
    language: str | Path,
    vision: str | Path,
    qformer: str | Path,
    projector: str | Path,
    output: str | Path,
    *,
    sizes: Blip2Config | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> dict[str, list[str]]:
    """Assemble a MiniGPT-4 from four parts and write it.

    The image token and a padding token follow the language model's own vocabulary, and the embeddings grow to a
    multiple of 64 rows. All other tensors are copied bit for bit, each in its own dtype; the biases of a ViT layer's
    queries and values become one tensor. As in the released code, a tensor that is in several files is taken from the
    last one of vision, qformer and projector.

    Args:
        language: folder of the Vicuna (v0, 7B or 13B), safetensors or `.bin`, sharded or not, with or without a
            tokenizer.
        vision: `eva_vit_g.pth`, EVA-CLIP's ViT-g/14.
        qformer: `blip2_pretrained_flant5xxl.pth`, the Q-Former, its queries and the LayerNorm between ViT and Q-Former.
        projector: `pretrained_minigpt4.pth`, the linear layer from the Q-Former's width to the language model's.
        output: a new or empty folder, written atomically.
        sizes: configuration of ViT and Q-Former; None for the released ones.
        shard_bytes: largest size of a file of weights, unless a single tensor is larger.

    Returns:
        By argument, the released names of the tensors that this model has no place for, such as the ViT's fortieth
        layer. The released code leaves them out, too.

    Raises:
        MissingExtraError: Pillow, which processes images, is not installed.
        FileNotFoundError, FileExistsError: a part is missing, or `output` is not empty.
        ValueError: a part is broken, lacks a tensor or has one of another shape; the message names the tensor.
    """
    require_extra("llava", "PIL", user="assemble")
    from transformers import Blip2ForConditionalGeneration, Blip2Processor, BlipImageProcessorPil

    language = Path(language)
    with configuration_errors("language and sizes", "Blip2"):
        config = _make_config(language, released_config() if sizes is None else sizes)
        shapes = parameter_shapes(lambda: Blip2ForConditionalGeneration(config))
    tensors = rename(read_model(language, "language"), language_name)
    if config.text_config.tie_word_embeddings:
        shapes.pop(EMBEDDINGS[1], None)
        tensors.pop(EMBEDDINGS[1], None)
    unknown = tensors.keys() - shapes.keys()
    if unknown:
        raise ValueError(
            f"language: {language} has what a Llama of these sizes has no place for: {join_names(unknown)}"
        )
    parts = {"language": Part(language, ("language_model.",))}
    left_out: dict[str, list[str]] = {}
    for argument, path, prefixes in (
        ("vision", vision, ("vision_model.embeddings.", "vision_model.encoder.")),
        ("qformer", qformer, ("qformer.", "query_tokens", "vision_model.post_layernorm.")),
        ("projector", projector, ("language_projection.",)),
    ):
        parts[argument] = Part(Path(path), prefixes)
        released = _join_biases(read_tensors(path, ENTRY)[0])
        left_out[argument] = [name for name in released if (_name_on_disk(name) or EMBEDDINGS[0]) not in shapes]
        tensors |= rename({n: released[n] for n in released.keys() - set(left_out[argument])}, _name_on_disk)
    check_missing(tensors, shapes, parts, "Blip2")
    check_shapes(tensors, shapes)

    tokenizer = extend_vocabulary(config, language)
    side = config.vision_config.image_size
    processor: Any = BlipImageProcessorPil(size={"height": side, "width": side})  # CLIP's mean and deviation
    if tokenizer is not None:
        # a Blip2Processor keeps no template, and with a number of queries it puts their tokens before the text
        tokenizer.chat_template = chat_template(config.num_query_tokens)
        processor = Blip2Processor(processor, tokenizer, num_query_tokens=None)
    with atomic_folder(output) as folder:
        write_model(folder, tensors, config, processor, shard_bytes)
    return left_out
