"""Small random models with chat templates, in folders as a user has them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
)

from smolora.minicvit.kinds import KINDS, BaseSettings, initialised, make_chat_tokenizer
from smolora.minicvit.pictures import MINICVIT_PICTURES

# older transformers have an Idefics3's image processor with torchvision alone, whatever the backend is
HAS_IDEFICS3 = not getattr(Idefics3ImageProcessorPil, "is_dummy", False)
CHAT_KINDS = ("qwen2_5_vl", "internvl", *["idefics3"] * HAS_IDEFICS3)
SIZES = {"vision_hidden": 16, "vision_layers": 1, "hidden": 32, "layers": 1}
TILE = 24  # pixels along a side of an Idefics3's tile, which is 4 image tokens


def save_chat(folder: Path, kind: str) -> Path:
    """Save a model with its processor; an answer may also end with <pad>."""
    if kind == "idefics3":
        model, processor = make_idefics3()
    else:
        base = KINDS[kind](BaseSettings(**SIZES, backbone=kind), MINICVIT_PICTURES)
        model, processor = base.model, base.processor
    if kind == "qwen2_5_vl":  # pictures of several sizes
        processor.image_processor.size = {"shortest_edge": 24 * 24, "longest_edge": 96 * 96}
    model.generation_config.eos_token_id = [0, processor.tokenizer.eos_token_id]
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def make_idefics3() -> tuple[Any, Idefics3Processor]:
    """An Idefics3, whose pictures are 3 or 5 tiles by their shape."""
    settings = BaseSettings(**SIZES)
    places = [f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)]
    special = ("<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>", *places)
    tokenizer = make_chat_tokenizer(MINICVIT_PICTURES, special, "<image>")
    config = Idefics3Config(
        vision_config={
            "image_size": TILE,
            "patch_size": TILE // 4,
            "hidden_size": settings.vision_hidden,
            "intermediate_size": 32,
            "num_hidden_layers": settings.vision_layers,
            "num_attention_heads": 4,
        },
        text_config={"model_type": "llama", **settings.text(tokenizer)},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        tie_word_embeddings=False,
    )
    images = Idefics3ImageProcessorPil(size={"longest_edge": 2 * TILE}, max_image_size={"longest_edge": TILE})
    processor = Idefics3Processor(images, tokenizer, image_seq_len=4, chat_template=tokenizer.chat_template)
    return initialised(Idefics3ForConditionalGeneration, config, settings.seed), processor
