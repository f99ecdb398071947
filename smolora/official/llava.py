"""The configuration of a LLaVA-1.5 from the sizes of its parts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import LlavaConfig


def llava_config(
    *, vision: dict[str, Any], text: dict[str, Any], image_token: int, feature_layer: int = -2, **options: Any
) -> LlavaConfig:
    """Configure a CLIP-like tower, a projector and a Llama as one LLaVA.

    Args:
        vision: arguments of `CLIPVisionConfig`; `image_size` and `patch_size` give the image tokens of a picture.
        text: arguments of `LlamaConfig`.
        image_token: id of the token that stands for one image token.
        feature_layer: of the tower, whose patches the projector sees.
        options: further arguments of `LlavaConfig`.
    """
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig  # heavy: imported where it is used

    return LlavaConfig(
        vision_config=CLIPVisionConfig(**vision),
        text_config=LlamaConfig(**text),
        image_token_index=image_token,
        image_seq_length=(vision["image_size"] // vision["patch_size"]) ** 2,
        vision_feature_layer=feature_layer,
        vision_feature_select_strategy="default",
        **options,
    )
