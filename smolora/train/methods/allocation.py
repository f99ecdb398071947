"""D-MoLE's allocator: which layers get an expert for a task, by the gradients of the pretrained model."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def gradient_scores(model: nn.Module, layers: Mapping[str, nn.Module], batches: Iterable[dict[str, Any]]) -> Tensor:
    """Sum the norms of the gradients of the layers' weights over batches, without a step of an optimiser.

    The weights themselves stay frozen, and may be quantised: their gradient is the product of a layer's input and its
    output's gradient.

    Args:
        model: the model without adapters in use; called in eval mode.
        layers: linear layers of the model by name, each called at most once in a forward.
        batches: arguments of the model's forward, which returns a loss.

    Returns:
        float64 (layers,), on the CPU: for each layer the sum over batches of the Frobenius norm of dloss/dW; 0 for a
        layer that no gradient reaches.

    Raises:
        ValueError: a norm is not finite.
    """
    names = list(layers)
    scores = torch.zeros(len(names), dtype=torch.float64)
    norms: dict[int, Tensor] = {}

    def watch(index: int) -> Any:
        def hook(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            x = args[0].detach()
            if not output.requires_grad:  # frozen up to here: the graph begins with this output
                output.requires_grad_()
            output.register_hook(lambda gradient: norms.__setitem__(index, _weight_norm(gradient, x)))

        return hook

    training = model.training
    handles = [layer.register_forward_hook(watch(index)) for index, layer in enumerate(layers.values())]
    try:
        model.eval()
        for batch in batches:
            norms.clear()
            with torch.enable_grad():
                model(**batch).loss.backward()
            for index, norm in norms.items():
                scores[index] += norm.double().cpu()
    finally:
        for handle in handles:
            handle.remove()
        model.train(training)
    if not bool(scores.isfinite().all()):
        raise ValueError(f"the gradient of {names[int((~scores.isfinite()).nonzero()[0])]} is not finite")
    return scores


def _weight_norm(gradient: Tensor, x: Tensor) -> Tensor:
    """Return the norm of a weight's gradient, from those of its output (..., k) and from its input (..., d)."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return torch.linalg.norm(gradient.flatten(0, -2).to(dtype).T @ x.flatten(0, -2).to(dtype))


def expert_budget(language: int, vision: int, ratio: float, least_vision: float) -> tuple[int, int]:
    """Return how many layers get an expert, and how many of them are of the vision tower at least.

    Args:
        language, vision: scored layers of the language model and of the vision tower.
        ratio: share of the scored layers that get an expert.
        least_vision: share of these that the vision tower gets at least.

    Raises:
        ValueError: the language model or the vision tower is left without an expert.
    """
    total = round(ratio * (language + vision))
    least = max(1, math.ceil(least_vision * total))
    if not language or not vision or total - least < 1:
        raise ValueError(
            f"budget must leave an expert for the language model and one for the vision tower, got {ratio} of "
            f"{language} and {vision} scored layers, {total} experts of which {least} or more for the vision tower"
        )
    return total, least


def allocate(
    scores: Mapping[str, float], vision: Collection[str], *, ratio: float, least_vision: float, seed: int
) -> list[str]:
    """Choose the layers that get an expert.

    Language model and vision tower share the budget as they share the sum of the scores, and in each the layers of the
    highest scores are chosen. A layer that no gradient reaches could not learn and is never chosen; where a modality
    has too few others, the rest of its budget is the other one's.

    Args:
        scores: of each layer, by name.
        vision: names of the layers of the vision tower.
        ratio, least_vision: as in `expert_budget`.
        seed: decides between equal scores.

    Returns:
        the names, in the order of `scores`.

    Raises:
        ValueError: as `expert_budget` does; or no gradient reaches any layer.
    """
    total, least = expert_budget(len(scores) - len(vision), len(vision), ratio, least_vision)
    draw = torch.randperm(len(scores), generator=torch.Generator().manual_seed(seed), device="cpu").tolist()
    ranked = sorted(zip(scores, draw, strict=True), key=lambda layer: (-scores[layer[0]], layer[1]))
    reached = [name for name, _ in ranked if scores[name] > 0]
    of_vision = [name for name in reached if name in vision]
    of_language = [name for name in reached if name not in vision]
    if not reached:
        raise ValueError("no gradient reaches any of the scored layers, so none can get an expert")
    share = sum(scores[name] for name in of_vision) / sum(scores[name] for name in reached)
    for_vision = min(max(round(share * total), least), total - 1, len(of_vision))
    for_language = min(total - for_vision, len(of_language))
    chosen = {*of_language[:for_language], *of_vision[: total - for_language]}
    return [name for name in scores if name in chosen]
