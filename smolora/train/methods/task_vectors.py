"""Vectors of tasks and how similar tasks are (He et al., arXiv 2311.16206), by images, instructions and answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ...instructions.encoder import InstructionEncoder
from ...recipe import Recipe
from ...tuner.features import image_dim, run_tower
from .stage import StageWork, in_eval_mode, without_adapter

KINDS = ("image", "instruction", "answer")
LONGEST = 128  # tokens of a text; the start of a longer one is cut off
TEXTS_AT_ONCE = 64
ROUNDING = 1e-6  # of the cosine of vectors whose features are float32


@torch.no_grad()
def image_vector(model: Any, work: StageWork, chosen: Sequence[int]) -> Tensor:
    """The mean feature of a task's images, of length 1, or zeros where no sample has an image.

    A feature is the pooled output of the model's vision tower, its class token, without adapters.

    Args:
        model: the model with adapters.
        work: the stage, whose processes share the samples.
        chosen: indices of its samples.

    Returns:
        float64 (e,), on the CPU.
    """
    base = model.get_base_model()
    total = torch.zeros(image_dim(base), dtype=torch.float64)
    with in_eval_mode(model), without_adapter(model):
        for batch in work.batches(chosen):
            if "pixel_values" in batch:
                hidden, pooled = run_tower(base, batch)
                features = hidden.mean(1) if pooled is None else pooled
                total += features.double().sum(0).cpu()
    return normalize(work.total(total.to(work.process.device)).cpu(), dim=0)


def text_vector(texts: Sequence[str], encode: Any) -> Tensor:
    """The mean embedding of texts, of length 1, float64 (e,)."""
    embedded: Tensor = encode(texts)
    return normalize(embedded.double().mean(0), dim=0)


class ClassToken:
    """Embeds texts by the class token of a BERT. Of a long text, the last 128 tokens are read.

    Args:
        folder: of the BERT, with its tokenizer.
        device: where it runs.
    """

    def __init__(self, folder: str, device: torch.device) -> None:
        from transformers import AutoModel, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, truncation_side="left")
        self.model = AutoModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32).to(device).eval()

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        """The embeddings (n, e), on the CPU."""
        rows = []
        for start in range(0, len(texts), TEXTS_AT_ONCE):
            part = list(texts[start : start + TEXTS_AT_ONCE])
            tokens = self.tokenizer(part, truncation=True, max_length=LONGEST, padding=True, return_tensors="pt")
            rows.append(self.model(**tokens.to(self.model.device)).last_hidden_state[:, 0].cpu())
        return torch.cat(rows)


def text_encoder(recipe: Recipe, folder: str | None, device: torch.device) -> Any:
    """What embeds texts: a BERT's class token, or the recipe's sentence encoder where no folder is given."""
    if folder is not None:
        return ClassToken(folder, device)
    settings = recipe.instructions
    return InstructionEncoder(settings.encoder, normalize=settings.normalize, device="cpu").encode


def similarity(vectors: Sequence[Sequence[Tensor]]) -> Tensor:
    """How similar the newest task is to each earlier one, in [0, 1].

    Of each kind of vector, the cosines of all pairs of tasks are standardised (by the deviation of a sample) and put
    through a sigmoid; cosines that differ by rounding alone count as equal. A pair's similarity is the product over the
    kinds. The single pair of two tasks has the product
    of its cosines, which is cut at 0.

    Args:
        vectors: of each of t tasks, in order, its vectors of length 1, one of each kind.

    Returns:
        float64 (t - 1,).
    """
    tasks = len(vectors)
    first, second = torch.triu_indices(tasks, tasks, offset=1)
    product = torch.ones(len(first), dtype=torch.float64)
    for kind in zip(*vectors, strict=True):
        stacked = torch.stack(kind).double()
        cosines = (stacked[first] * stacked[second]).sum(1)
        if len(cosines) > 1:
            centred = cosines - cosines.mean()
            deviation = centred.square().sum().div(len(cosines) - 1).sqrt()
            cosines = torch.sigmoid(centred / deviation if deviation > ROUNDING else 0 * centred)
        product *= cosines
    return product[second == tasks - 1].clamp(0, 1)
