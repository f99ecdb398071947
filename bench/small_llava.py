"""A small LLaVA made in code, with tokenizer, images and questions: for benchmarks and tests of the evaluator."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from peft import get_peft_model
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPImageProcessorPil,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

import smolora
from smolora.data.prompts import SYSTEM
from smolora.official.llava import llava_config

SPECIAL = ["<pad>", "<s>", "</s>", "<image>"]
WORDS = ["what", "is", "the", "colour", "of", "this", "thing", "how", "many", "dogs", "left", "or", "right", "here"]
INSTRUCTION = "Answer the question using a single word or phrase."


def small_tokenizer() -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on the prompt's words."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([f"{SYSTEM} USER: {' '.join(WORDS)} {INSTRUCTION} ASSISTANT:"] * 2, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )


def small_llava(
    *,
    hidden: int = 32,
    intermediate: int = 96,
    layers: int = 2,
    heads: int = 4,
    vision_hidden: int = 32,
    vision_layers: int = 2,
    image_size: int = 28,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> LlavaForConditionalGeneration:
    """Make a random LLaVA in eval mode whose greedy tokens are clear choices; patches of 14 x 14 pixels."""
    config = llava_config(
        vision={
            "hidden_size": vision_hidden,
            "intermediate_size": 4 * vision_hidden,
            "num_hidden_layers": vision_layers,
            "num_attention_heads": max(1, vision_hidden // 32),
            "image_size": image_size,
            "patch_size": 14,
            "projection_dim": vision_hidden,
        },
        text={
            "vocab_size": 400,
            "hidden_size": hidden,
            "intermediate_size": intermediate,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "max_position_embeddings": 2048,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        image_token=3,
    )
    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model = LlavaForConditionalGeneration(config).eval()
    finally:
        torch.set_default_dtype(before)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return model


def small_adapter(model: LlavaForConditionalGeneration, *, seed: int = 1, **options) -> torch.nn.Module:
    """Put a SMoLoRA adapter on the model, with values in B as after training."""
    options = {"r": 4, "lora_alpha": 8, "num_vu_experts": 3, "num_if_experts": 3, "task_type": "CAUSAL_LM", **options}
    model = get_peft_model(model, smolora.SMoLoRAConfig(**options)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".smolora_experts." in name and name.endswith("_B"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator, device="cpu") * 0.3)
    return model


def save_base(folder: Path, model: LlavaForConditionalGeneration) -> Path:
    """Save the model as `from_pretrained` reads it, with tokenizer and image processor; return the folder."""
    size = model.config.vision_config.image_size
    model.save_pretrained(folder)
    small_tokenizer().save_pretrained(folder)
    processor = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    processor.save_pretrained(folder)
    return folder


def write_questions(
    folder: Path, count: int, *, name: str = "val.json", seed: int = 0, without_image: int = 0, side: int = 40
) -> Path:
    """Write a test file as released, with drawn images; the last `without_image` questions have none."""
    draw = np.random.default_rng(seed)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    records = []
    for index in range(count):
        words = " ".join(draw.choice(WORDS, size=draw.integers(2, 12)))
        record = {"question_id": index, "text": f"{words}?\n{INSTRUCTION}", "answer": str(draw.choice(WORDS))}
        if index < count - without_image:
            record["image"] = f"images/{index}.png"
            height, width = draw.integers(side // 2, side, size=2)
            pixels = draw.integers(0, 255, size=(height, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / record["image"])
        records.append(record)
    path = folder / name
    path.write_text(json.dumps(records))
    return path


def embed_questions(texts: list[str], size: int = 384) -> torch.Tensor:
    """Make up embeddings (n, size) that depend on the text alone."""
    rows = [np.random.default_rng(sum(map(ord, text))).standard_normal(size) for text in texts]
    return torch.tensor(np.array(rows), dtype=torch.float32)
