"""A whole LLaVA with random weights, and the adapters that benchmarks put on it."""

from __future__ import annotations

import argparse
import copy
import re
import sys
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlavaForConditionalGeneration

import smolora
from peers import official
from runs import choose_device
from smolora.official.llava import llava_config
from smolora.tuner.model import TARGETS
from workload import INSTRUCTION_DIM, SCALING, TRAINED


@dataclass(frozen=True)
class ModelShape:
    """A LLaVA and a batch: `batch` samples of one image and `text` tokens each."""

    name: str
    hidden: int
    ffn: int
    layers: int
    heads: int
    vocabulary: int
    vision_hidden: int
    vision_layers: int
    image: int
    patch: int
    batch: int
    text: int
    dtype: str
    r: int = 16
    experts: int = 4  # of either branch
    dropout: float = 0.05

    @property
    def image_tokens(self) -> int:
        return (self.image // self.patch) ** 2

    @property
    def tokens(self) -> int:
        """Tokens of one sample."""
        return self.image_tokens + self.text


PRESETS = {
    "llava-7b": ModelShape(
        "llava-7b",
        hidden=4096,
        ffn=11008,
        layers=32,
        heads=32,
        vocabulary=32064,
        vision_hidden=1024,
        vision_layers=24,
        image=336,
        patch=14,
        batch=8,
        text=128,
        dtype="bfloat16",
    ),
    # the same proportions: FFN 2.69 times the hidden size, vision a quarter of it, 4.5 image tokens to one of text
    "small": ModelShape(
        "small",
        hidden=512,
        ffn=1376,
        layers=2,
        heads=8,
        vocabulary=2048,
        vision_hidden=128,
        vision_layers=2,
        image=168,
        patch=14,
        batch=4,
        text=32,
        dtype="float32",
    ),
    "check": ModelShape(
        "check",
        hidden=64,
        ffn=176,
        layers=2,
        heads=4,
        vocabulary=128,
        vision_hidden=32,
        vision_layers=2,
        image=56,
        patch=14,
        batch=3,
        text=8,
        dtype="float32",
        r=4,
        dropout=0.0,
    ),
}


def make_base(shape: ModelShape, device: torch.device) -> LlavaForConditionalGeneration:
    """Make the frozen model, with random weights, on the device."""
    config = llava_config(
        vision={
            "hidden_size": shape.vision_hidden,
            "intermediate_size": 4 * shape.vision_hidden,
            "num_hidden_layers": shape.vision_layers,
            "num_attention_heads": max(1, shape.vision_hidden // 64),
            "image_size": shape.image,
            "patch_size": shape.patch,
        },
        text={
            "vocab_size": shape.vocabulary,
            "hidden_size": shape.hidden,
            "intermediate_size": shape.ffn,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "max_position_embeddings": 4096,
            "use_cache": False,
        },
        image_token=shape.vocabulary - 1,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = LlavaForConditionalGeneration._from_config(config, dtype=getattr(torch, shape.dtype))
    return model.requires_grad_(False).train()


def shared_copy(base: nn.Module) -> nn.Module:
    """Copy a model, but for its tensors, which are shared."""
    return copy.deepcopy(base, {id(t): t for t in [*base.parameters(), *base.buffers()]})


def targets(model: nn.Module) -> dict[str, nn.Linear]:
    """Return the linear layers that adapters are put on, by name."""
    chosen = re.compile(TARGETS["linear"]["llava"])
    return {name: module for name, module in model.named_modules() if chosen.fullmatch(name)}


def draw_adapter(name: str, linear: nn.Linear, shape: ModelShape) -> dict[str, Tensor]:
    """Draw a layer's adapter as in mid-training, the same for every peer: float32, on the layer's device.

    B is small enough that 32 layers of it do not make noise of what 16 bits round off.
    """
    d, k, r, e = linear.in_features, linear.out_features, shape.r, shape.experts
    sizes = {
        "vu_A": (e, r, d),
        "vu_B": (e, k, r),
        "if_A": (e, r, d),
        "if_B": (e, k, r),
        "vu_router": (e, d),
        "if_router": (e, INSTRUCTION_DIM),
        "vu_importance": (k,),
        "if_importance": (k,),
    }
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    device = linear.weight.device
    scales = {n: s[-1] ** -0.5 * (0.3 if n.endswith("_B") else 1.0) for n, s in sizes.items()}
    return {n: torch.randn(s, generator=generator).mul_(scales[n]).to(device) for n, s in sizes.items()}


def with_lora(shape: ModelShape, base: nn.Module, float32_adapter: bool = False) -> PeftModel:
    """Put PEFT's LoRA of rank 2r on the base."""
    config = LoraConfig(
        r=2 * shape.r,
        lora_alpha=SCALING * 2 * shape.r,
        lora_dropout=shape.dropout,
        target_modules=TARGETS["linear"]["llava"],
    )
    return get_peft_model(shared_copy(base), config, autocast_adapter_dtype=float32_adapter)


def with_smolora(shape: ModelShape, base: nn.Module, **options: str) -> PeftModel:
    """Put this package's adapter on the base; `options` go into its configuration."""
    config = smolora.SMoLoRAConfig(
        r=shape.r,
        lora_alpha=SCALING * shape.r,
        lora_dropout=shape.dropout,
        num_vu_experts=shape.experts,
        num_if_experts=shape.experts,
        instruction_dim=INSTRUCTION_DIM,
        **options,
    )
    model = get_peft_model(shared_copy(base), config)
    with torch.no_grad():
        for name, linear in targets(base).items():
            experts = model.get_submodule(f"base_model.model.{name}").smolora_experts["default"]
            for kind, values in draw_adapter(name, linear, shape).items():
                if hasattr(experts, kind):  # computed routers are no weights of a layer
                    getattr(experts, kind).copy_(values)
    return model


class OfficialLinear(nn.Module):
    """The released layer, written out: `peers.official` around a frozen linear layer, in the layer's dtype."""

    def __init__(self, linear: nn.Linear, adapter: dict[str, Tensor], instruction: Tensor, dropout: float) -> None:
        super().__init__()
        self.linear, self.instruction, self.dropout = linear, instruction, dropout
        dtype = linear.weight.dtype
        self.adapter = nn.ParameterDict({n: nn.Parameter(v.to(dtype), n in TRAINED) for n, v in adapter.items()})

    def forward(self, x: Tensor) -> Tensor:
        dropout = (lambda x: F.dropout(x, self.dropout)) if self.dropout else None
        adapter = {name: self.adapter[name] for name in self.adapter}
        return official(x, self.linear(x), adapter, self.instruction.to(x.dtype), None, dropout)


def with_official(shape: ModelShape, base: nn.Module, instruction: Tensor) -> nn.Module:
    """Put the released algorithm on the base, for samples with these instructions (B, e)."""
    model = shared_copy(base)
    for name, linear in targets(base).items():
        parent, _, child = name.rpartition(".")
        adapter = draw_adapter(name, linear, shape)
        setattr(model.get_submodule(parent), child, OfficialLinear(linear, adapter, instruction, shape.dropout))
    return model


def flags(description: str, preset: str, peers: Iterable[str], seconds: float) -> argparse.ArgumentParser:
    """Make a parser with the flags that the benchmarks of whole models share; `preset` says what a preset sets."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="small", help=f"{preset} (default: %(default)s)")
    parser.add_argument("--peers", help=f"comma-separated, of {', '.join(peers)}")
    parser.add_argument(
        "--seconds", type=float, default=seconds, help="to spend on timing, about (default: %(default)s)"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--output", type=Path, help="folder of the results (default: bench/results/<device>)")
    return parser


def chosen_peers(parser: argparse.ArgumentParser, asked: str | None, peers: Iterable[str]) -> list[str]:
    """Return the peers of `--peers`, all of them if it is left out."""
    names = asked.split(",") if asked else list(peers)
    if unknown := set(names) - set(peers):
        parser.error(f"--peers: {', '.join(sorted(unknown))} unknown; known: {', '.join(peers)}")
    return names


def device_for(asked: str, shape: ModelShape) -> torch.device:
    """Return the device of `--device`.

    Raises:
        SystemExit: the device is missing, or too small for the shape.
    """
    device = choose_device(asked)
    if device.type == "cpu" and shape.hidden > 1024:
        sys.exit(f"--preset {shape.name} needs a GPU")
    return device
