"""A LLaVA in small, made in code: model, tokenizer, images and questions, for benchmarks and tests of the evaluator."""

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
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

import smolora
from smolora.data.prompts import SYSTEM

SPECIAL = ["<pad>", "<s>", "</s>", "<image>"]
WORDS = ["what", "is", "the", "colour", "of", "this", "thing", "how", "many", "dogs", "left", "or", "right", "here"]
INSTRUCTION = "Answer the question using a single word or phrase."


def small_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE that knows the prompt's words."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator([f"{SYSTEM} USER: {' '.join(WORDS)} {INSTRUCTION} ASSISTANT:"] * 2, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )


def small_llava(
    *, hidden: int = 32, layers: int = 2, image_size: int = 28, patch_size: int = 14, seed: int = 0
) -> LlavaForConditionalGeneration:
    """A random LLaVA in float32 and eval mode whose greedy tokens are clear choices."""
    vision = CLIPVisionConfig(
        hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=2, num_attention_heads=2,
        image_size=image_size, patch_size=patch_size, projection_dim=hidden,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=400, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=1024, pad_token_id=0, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=3, vision_feature_layer=-2,
        vision_feature_select_strategy="default", image_seq_length=(image_size // patch_size) ** 2,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return model


def small_adapter(model: LlavaForConditionalGeneration, *, seed: int = 1, **options) -> torch.nn.Module:
    """The model with a SMoLoRA adapter whose B has values, as after training."""
    options = {"r": 4, "lora_alpha": 8, "num_vu_experts": 3, "num_if_experts": 3, "task_type": "CAUSAL_LM", **options}
    model = get_peft_model(model, smolora.SMoLoRAConfig(**options)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".smolora_experts." in name and name.endswith("_B"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def save_base(folder: Path, model: LlavaForConditionalGeneration) -> Path:
    """The model's folder as `from_pretrained` reads it, with tokenizer and image processor."""
    size = model.config.vision_config.image_size
    model.save_pretrained(folder)
    small_tokenizer().save_pretrained(folder)
    processor = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    processor.save_pretrained(folder)
    return folder


def write_questions(
    folder: Path, count: int, *, name: str = "val.json", seed: int = 0, without_image: int = 0, side: int = 40
) -> Path:
    """A test file as released, with drawn images beside it; the last `without_image` questions have none."""
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
    """Made embeddings (n, size) that depend on the text alone."""
    rows = [np.random.default_rng(sum(map(ord, text))).standard_normal(size) for text in texts]
    return torch.tensor(np.array(rows), dtype=torch.float32)
