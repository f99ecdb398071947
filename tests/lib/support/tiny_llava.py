"""A tiny Llava made in code, and batches for it: seconds on a CPU."""

from __future__ import annotations

import torch
from peft import get_peft_model
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
    PreTrainedModel,
)

import smolora
from smolora.official.llava import llava_config

PAD, BOS, EOS, IMAGE = 0, 1, 2, 3
PATCHES = 4  # tokens of an image
VOCABULARY = 64
INSTRUCTION_DIM = 12
FFN = ("gate_proj", "up_proj", "down_proj")
PARAMETERS = ("vu_A", "vu_B", "if_A", "if_B", "vu_router", "if_router", "vu_importance", "if_importance")
ADAPTED = [f"model.language_model.layers.{i}.mlp.{name}" for i in range(2) for name in FFN] + [
    f"model.multi_modal_projector.linear_{i}" for i in (1, 2)
]


TEXT = dict(
    vocab_size=VOCABULARY,
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    max_position_embeddings=128,
    pad_token_id=PAD,
    bos_token_id=BOS,
    eos_token_id=EOS,
)


def _filled(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Weights as large as after training, so that inputs and layers show in greedy tokens; eval mode."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=1.5 * parameter[0].numel() ** -0.5)
        model.get_input_embeddings().weight.normal_()
        model.get_output_embeddings().weight[IMAGE] = 0  # never the best token
    model.generation_config.pad_token_id = PAD
    return model.to(dtype).eval()


def tiny_llama(seed: int = 0, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """The text half by itself."""
    torch.manual_seed(seed)
    return _filled(LlamaForCausalLM(LlamaConfig(**TEXT)), dtype)


def tiny_llava(seed: int = 0, dtype: torch.dtype = torch.float32) -> LlavaForConditionalGeneration:
    """A Llava with 2 text layers of width 64 and 2x2 patches an image, random, in eval mode."""
    vision = dict(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
        projection_dim=16,
    )
    config = llava_config(vision=vision, text=TEXT, image_token=IMAGE)
    torch.manual_seed(seed)
    return _filled(LlavaForConditionalGeneration(config), dtype)


def tiny_config(**options) -> smolora.SMoLoRAConfig:
    """A small adapter without dropout."""
    defaults = dict(r=4, lora_alpha=8, lora_dropout=0.0, num_vu_experts=3, num_if_experts=3)
    return smolora.SMoLoRAConfig(
        **{**defaults, "instruction_dim": INSTRUCTION_DIM, "task_type": "CAUSAL_LM", **options}
    )


def fill_adapters(model: torch.nn.Module, seed: int = 1) -> None:
    """Give the adapters' A and B values, so that they change outputs, as after training."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if ".smolora_experts." in name and name.endswith(("_A", "_B")):
            with torch.no_grad():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)


def adapted(config: smolora.SMoLoRAConfig | None = None, seed: int = 0):
    """A tiny Llava with a filled adapter, in eval mode."""
    model = get_peft_model(tiny_llava(seed), config or tiny_config())
    fill_adapters(model)
    return model.eval()


def sample(text: int, images: int, generator: torch.Generator) -> list[int]:
    """Token ids: BOS, the images' placeholders, then `text` words."""
    words = torch.randint(4, VOCABULARY, (text,), generator=generator).tolist()
    return [BOS] + [IMAGE] * (PATCHES * images) + words


def batch(lengths=(5, 9), images=None, seed: int = 0, answer: int = 0) -> dict[str, Tensor]:
    """A left-padded batch of texts, with an image each unless `images` has their numbers: `input_ids`,
    `attention_mask`, `pixel_values` if there are any images, and with `answer` `labels`, which label the last `answer`
    tokens of each sample.
    """
    images = images or (1,) * len(lengths)
    generator = torch.Generator().manual_seed(seed)
    rows = [sample(length, count, generator) for length, count in zip(lengths, images, strict=True)]
    width = max(map(len, rows))
    ids = torch.tensor([[PAD] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    out = {"input_ids": ids, "attention_mask": mask}
    if sum(images):
        out["pixel_values"] = torch.randn(sum(images), 3, 28, 28, generator=generator)
    if answer:
        labels = torch.full_like(ids, -100)
        labels[:, -answer:] = ids[:, -answer:]
        out["labels"] = labels
    return out


def embeddings(rows: int, seed: int = 0) -> Tensor:
    """Instruction embeddings (rows, INSTRUCTION_DIM)."""
    return torch.randn(rows, INSTRUCTION_DIM, generator=torch.Generator().manual_seed(seed))


def logits(model: torch.nn.Module, seed: int = 0, **extra) -> Tensor:
    """Of one batch, by the embeddings of a seed."""
    with torch.no_grad():
        return model(**batch(), instruction_embeds=embeddings(2, seed), **extra).logits


def trainable(model: torch.nn.Module) -> set[str]:
    """The names of the parameters that train."""
    return {name for name, p in model.named_parameters() if p.requires_grad}
