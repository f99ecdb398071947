"""What the package knows of each type of model: which layers get adapters, and in what rows they see images.

This table is the only place with facts of a family. Its keys are `config.model_type`; see `family_of`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

# How the layers of a connector get a forward's images:
#   images   each image, or each of its tiles, is a row, and all have the same number of tokens
#   padded   the same, but pixel_values have a dimension for samples, and images of zeros are padding
#   tiles    each tile is a row, and how many rows and tokens an image has depends on its size (`image_sizes`)
#   sizes    all images in one row; `image_sizes` tells where each begins
#   grid     all images in one row; `image_grid_thw` tells where each begins
#   flat     tiles of the same number of tokens, one after another in one row
#   samples  each sample is a row, with its images and their tiles in dimensions of their own
ImageRows = Literal["images", "padded", "tiles", "sizes", "grid", "flat", "samples"]
Target = Literal["linear", "block", "projector", "attention"]


@dataclass(frozen=True)
class Family:
    """A type of model.

    Layers are regular expressions of their names, which may begin anywhere in the model.

    Attributes:
        ffn: linear layers of the language model's feed-forward blocks. Experts that are 3-D parameters are named too.
        blocks: its feed-forward blocks; None where they have no gate_proj, up_proj and down_proj of their own.
        connector: modules that join images to the text; None for a text model.
        connector_linears: their linear layers; None where there is none.
        image_rows: how those get images; None for a text model.
        maps_patches: whether the connector is one module that maps each patch by itself, (images, patches, d) to
            (images, patches, k).
        attention: the linear layers of the attention of language model and vision tower; None where there is no tower
            that shows its output.
        tower_size: the field of `vision_config` with the size of the vision tower's last hidden states.
    """

    ffn: str
    blocks: str | None
    connector: str | None = None
    connector_linears: str | None = None
    image_rows: ImageRows | None = None
    maps_patches: bool = False
    attention: str | None = None
    tower_size: str = "hidden_size"

    def is_in_connector(self, name: str) -> bool:
        """Return whether a parameter or module is in the connector, by its name in the model."""
        return self.connector is not None and re.search(rf"(^|\.)({self.connector})\.", f"{name}.") is not None

    def targets(self, kind: Target) -> str | None:
        """Return the modules that methods on a kind of target adapt by default; None if there are none."""
        chosen = {
            "linear": "|".join(part for part in (self.ffn, self.connector_linears) if part),
            "block": self.blocks,
            "projector": self.connector if self.maps_patches else None,
            "attention": self.attention,
        }[kind]
        return None if chosen is None else rf"(.*\.)?({chosen})"


EXPERTS = r"((shared_)?experts?\.)?"
LAYERS = "(gate_proj|up_proj|down_proj|gate_up_proj)"


# of Llama and its kin, or of OPT, or of Qwen3.5's layers without softmax
TEXT_ATTENTION = r"(language_model|text_model)\..*\.(self_attn\.(q|k|v|o|out)_proj|linear_attn\.(in_proj_qkv|out_proj))"
# of CLIP, SigLIP and their kin, or of InternVL's tower, or of BLIP's
TOWER_ATTENTION = (
    r"(vision_tower|vision_model)\..*\.(self_attn|attention)\.((q|k|v|o|out)_proj|projection_layer|qkv|projection)"
)
GRID_ATTENTION = r"visual\.blocks\.\d+\.attn\.(qkv|proj)"


def _seeing(connector: str, linears: str | None, rows: ImageRows, *, blocks: bool = True, **more: Any) -> Family:
    """A model with a language model in it. Other modules of it may have feed-forward blocks with the same names."""
    text = r"(language_model|text_model)\.(.*\.)?(mlp|feed_forward)"
    tower = GRID_ATTENTION if rows == "grid" else TOWER_ATTENTION
    options = {"attention": f"{TEXT_ATTENTION}|{tower}", **more}
    return Family(rf"{text}\.{EXPERTS}{LAYERS}", text if blocks else None, connector, linears, rows, **options)


PROJECTOR = "multi_modal_projector"
TWO_LAYERS = rf"{PROJECTOR}\.linear_[12]"
MERGERS = r"visual\.(merger|deepstack_merger_list\.\d+)"
TEXT = Family(rf"mlp\.{EXPERTS}{LAYERS}", "mlp")
TEXT_OF_OTHER_BLOCKS = Family(TEXT.ffn, None)
LLAVA = _seeing(PROJECTOR, TWO_LAYERS, "images", maps_patches=True)
LLAVA_NEXT = _seeing(PROJECTOR, TWO_LAYERS, "tiles", maps_patches=True)
PIXTRAL = _seeing(PROJECTOR, TWO_LAYERS, "sizes")  # its type is LLaVA's
IDEFICS3 = _seeing("connector", r"connector\.modality_projection\.proj", "padded")
QWEN2_5_VL = _seeing(r"visual\.merger", r"visual\.merger\.mlp\.[02]", "grid")
QWEN3_VL = _seeing(MERGERS, rf"{MERGERS}\.linear_fc[12]", "grid")
BLIP = Family(
    rf"language_model\.(.*\.)?(mlp\.{LAYERS}|fc[12])",  # of Llama and Vicuna, or of OPT
    r"language_model\.(.*\.)?mlp",
    "language_projection",
    "language_projection",
    "images",
    attention=f"{TEXT_ATTENTION}|{TOWER_ATTENTION}",
)

FAMILIES: dict[str, Family] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"), TEXT),
    **dict.fromkeys(("phi3", "qwen2_moe", "qwen3_moe"), TEXT_OF_OTHER_BLOCKS),
    **dict.fromkeys(("llava", "vipllava", "internvl"), LLAVA),
    **dict.fromkeys(("llava_next", "llava_next_video", "llava_onevision"), LLAVA_NEXT),
    "mistral3": PIXTRAL,
    "qwen2_vl": replace(QWEN2_5_VL, tower_size="embed_dim"),  # its hidden_size is the text model's
    "qwen2_5_vl": QWEN2_5_VL,
    **dict.fromkeys(("qwen3_vl", "qwen3_5"), QWEN3_VL),
    "qwen3_vl_moe": _seeing(MERGERS, rf"{MERGERS}\.linear_fc[12]", "grid", blocks=False),
    "glm4v": _seeing(
        r"visual\.merger",
        r"visual\.merger\.(proj|gate_proj|up_proj|down_proj)",
        "grid",
        blocks=False,
        tower_size="out_hidden_size",
    ),
    **dict.fromkeys(("idefics3", "smolvlm"), IDEFICS3),
    "paligemma": _seeing(PROJECTOR, rf"{PROJECTOR}\.linear", "images", maps_patches=True),
    "gemma3": _seeing(PROJECTOR, None, "images"),  # its projector's weight is a parameter of its own
    "llama4": _seeing(
        rf"{PROJECTOR}|vision_model\.vision_adapter",
        rf"{PROJECTOR}\.linear_1|vision_model\.vision_adapter\.mlp\.fc[12]",
        "flat",
        blocks=False,
        tower_size="vision_output_dim",
    ),
    "mllama": _seeing(PROJECTOR, PROJECTOR, "samples", attention=None),
    **dict.fromkeys(("blip-2", "instructblip"), BLIP),
}


def family_of(config: Any) -> Family | None:
    """Return the family of a model by its configuration; None if it is not known."""
    tower = getattr(getattr(config, "vision_config", None), "model_type", None)
    kind = getattr(config, "model_type", None)
    return PIXTRAL if (kind, tower) == ("llava", "pixtral") else FAMILIES.get(str(kind))


def default_targets(kind: Target) -> dict[str, str]:
    """Return what methods on a kind of target adapt by default, by type of model."""
    found = {name: family.targets(kind) for name, family in FAMILIES.items()}
    return {name: targets for name, targets in found.items() if targets is not None}


def no_default(argument: str, model_type: str, known: Mapping[str, str]) -> str:
    """Return the message for a type of model whose default targets are unknown.

    Args:
        argument: what has to be given.
        model_type: of the model.
        known: the default targets by type of model.
    """
    return (
        f"{argument} must be given for a model of type {model_type!r}: names, or a regular expression of the modules "
        f"to adapt, as {known['llava']!r} is for 'llava'. Known types are {', '.join(known)}"
    )
