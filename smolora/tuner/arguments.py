"""How the arguments of a model's forward are read."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from ..data.prompts import IGNORED_LABEL
from ..methods.checks import reads_values
from .samples import KEYWORDS

OWN_KEYWORDS = (*KEYWORDS, "image_to_sample", "prompt_mask")  # the arguments that adapters add to a model's forward
CACHE_NAMES = ("cache", "past_key_values")  # in arguments and outputs: of transformers 5.24, and before


def token_input(inputs: dict[str, Any]) -> Tensor | None:
    """Return the input of a forward, (B, S) or (B, S, hidden)."""
    embeds = inputs.get("inputs_embeds")
    return embeds if embeds is not None else inputs.get("input_ids")


def cache_input(inputs: dict[str, Any]) -> Any:
    """Return the cache that a forward is given; None if it is given none."""
    return next((inputs[name] for name in CACHE_NAMES if inputs.get(name) is not None), None)


def cache_output(output: Any) -> Any:
    """Return the cache in a forward's output; None if there is none."""
    if isinstance(output, tuple):  # return_dict=False
        return next((part for part in output if isinstance(part, Cache)), None)
    return next((found for name in CACHE_NAMES if (found := getattr(output, name, None)) is not None), None)


def image_positions(inputs: dict[str, Any], image_token: int | None) -> Tensor | None:
    """Return the tokens (B, S) that stand for images; None if they are unknown."""
    ids = inputs.get("input_ids")
    return None if ids is None or image_token is None else ids == image_token


def check_image_to_sample(image_to_sample: Any, samples: int | None) -> Tensor | None:
    """Check the argument `image_to_sample`; return it as int64.

    Raises:
        ValueError: it is no integer tensor (images,), or names a sample that is not there.
    """
    if image_to_sample is None:
        return None
    integers = (torch.int32, torch.int64)
    if not isinstance(image_to_sample, Tensor) or image_to_sample.dim() != 1 or image_to_sample.dtype not in integers:
        got = image_to_sample
        if isinstance(got, Tensor):
            got = f"{got.dtype} of shape {tuple(got.shape)}"
        raise ValueError(f"image_to_sample must be an integer tensor (images,), the sample of each image, got {got}")
    if samples is not None and reads_values(image_to_sample) and image_to_sample.numel():
        low, high = int(image_to_sample.min()), int(image_to_sample.max())
        if low < 0 or high >= samples:
            raise ValueError(f"image_to_sample must lie in 0 to {samples - 1}, got {low} to {high}")
    return image_to_sample.long()


def read_masks(
    inputs: dict[str, Any], prompt_mask: Any, shape: tuple[int, int], *, prompted: bool, training: bool
) -> dict[str, Tensor | None]:
    """Return the masks of a forward over (B, S) tokens: `valid`, without padding, and `prompt`, without the answer.

    Args:
        prompted: whether an adapter routes over the prompt.
        training: whether the model is in training mode, where the prompt has to be told.

    Raises:
        ValueError: a mask or the labels do not fit the tokens, or nothing tells the prompt in training.
    """
    valid, labels = inputs.get("attention_mask"), inputs.get("labels")
    batch, count = shape
    if valid is not None:
        if not isinstance(valid, Tensor) or valid.dim() != 2 or valid.shape[0] != batch or valid.shape[1] < count:
            got = tuple(valid.shape) if isinstance(valid, Tensor) else type(valid).__name__
            raise ValueError(
                f"attention_mask must be ({batch}, {count}), which tokens are no padding: the adapters route over "
                f"those (only route_over='all' needs no mask), got {got}"
            )
        valid = valid[:, valid.shape[1] - count :].bool()
    prompt = None
    if prompted and prompt_mask is not None:
        integers = (torch.bool, torch.int32, torch.int64)
        if not isinstance(prompt_mask, Tensor) or prompt_mask.shape != shape or prompt_mask.dtype not in integers:
            got = prompt_mask
            if isinstance(got, Tensor):
                got = f"{got.dtype} of shape {tuple(got.shape)}"
            raise ValueError(
                f"prompt_mask must be bool ({batch}, {count}), True where a token is no answer: the adapters route "
                f"over those (route_over='prompt'), got {got}"
            )
        prompt = prompt_mask.bool()
    elif prompted and labels is not None:
        if tuple(labels.shape) != shape:
            raise ValueError(
                f"labels must be ({batch}, {count}), {IGNORED_LABEL} where a token is no answer: the adapters "
                f"route over those (route_over='prompt'), got {tuple(labels.shape)}"
            )
        prompt = labels == IGNORED_LABEL
    elif prompted and training:
        raise ValueError(
            "prompt_mask must be given in training where labels are not (Trainer takes them away for "
            f"label_smoothing_factor and compute_loss_func): bool ({batch}, {count}), True where a token is no "
            "answer. The adapters route over those (route_over='prompt'), as they do when answers are generated"
        )
    if prompt is not None and valid is not None:
        prompt = prompt.to(valid.device)
    return {"valid": valid, "prompt": prompt}
