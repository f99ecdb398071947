"""What assembling a model of parts takes, whichever model it is: names, checks, the vocabulary and the files."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor, nn

from ..instructions.texts import IMAGE_TOKEN
from ..io.files import join_names
from ..io.tensors import save_tensors

if TYPE_CHECKING:  # transformers' models take seconds to import
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

PAD_TOKEN = "<pad>"
VOCABULARY_MULTIPLE = 64  # as in public llava-1.5 checkpoints: 32000 tokens, image and padding make 32064 rows
SHARD_BYTES = 5 * 10**9
EMBEDDINGS = ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight")  # a row for each token
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")


class Part(NamedTuple):
    """One of the files or folders that a model is made of."""

    path: Path
    prefixes: tuple[str, ...]  # of the names on disk that its tensors have in the model


# ------------------------------------------------------------------------------------------------------ configurations


def read_config(folder: Path, argument: str) -> PretrainedConfig:
    """Read the configuration of a part.

    Raises:
        FileNotFoundError: the folder has none.
        ValueError: transformers does not know such a model.
    """
    from transformers import AutoConfig

    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{argument} must be a folder with a config.json, got {folder}")
    return AutoConfig.from_pretrained(folder)


@contextmanager
def configuration_errors(arguments: str, model: str) -> Iterator[None]:
    """Turn whatever transformers raises about a wrong configuration into one ValueError.

    Args:
        arguments: the arguments that the configuration comes from.
        model: what is made of it.
    """
    try:
        yield
    except (OSError, ValueError):
        raise
    except Exception as error:  # a wrong configuration may raise anything
        raise ValueError(
            f"{arguments} have configurations of which transformers cannot make a {model}: "
            f"{type(error).__name__}: {error}"
        ) from error


def parameter_shapes(make: Callable[[], nn.Module]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a model's parameters by their names; it is built on the meta device."""
    with torch.device("meta"):
        return {name: tuple(parameter.shape) for name, parameter in make().named_parameters()}


# --------------------------------------------------------------------------------------------------------- the tensors


def language_name(name: str) -> str | None:
    """Return the name on disk of a language model's tensor; None for a buffer that older transformers saved."""
    return None if name.endswith("rotary_emb.inv_freq") else f"language_model.{name}"


def rename(tensors: Mapping[str, Tensor], new_name: Callable[[str], str | None]) -> dict[str, Tensor]:
    """Rename tensors, without those whose new name is None."""
    return {new: tensor for name, tensor in tensors.items() if (new := new_name(name)) is not None}


def check_missing(
    tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], parts: Mapping[str, Part], model: str
) -> None:
    """Check that every part has its tensors of the model.

    Raises:
        ValueError: one is missing. The message names the argument, its path and the tensor.
    """
    for argument, (path, prefixes) in parts.items():
        missing = {name for name in shapes if name.startswith(prefixes)} - tensors.keys()
        if missing:
            raise ValueError(f"{argument}: {path} lacks {join_names(missing)} (by their names in a {model})")


def check_shapes(tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Check the shapes and data types of a model's tensors.

    Raises:
        ValueError: a tensor is of another shape, or of integers.
    """
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != shapes[name] or not tensor.is_floating_point():
            raise ValueError(
                f"{name!r} must be floating point of shape {shapes[name]}, got {tensor.dtype} of {tuple(tensor.shape)}"
            )


# ------------------------------------------------------------------------------------------------------ the vocabulary


def extend_vocabulary(config: Any, language: Path) -> PreTrainedTokenizerBase | None:
    """Append an image token and a padding token to the vocabulary of a model's configuration, in place.

    The embeddings grow to a multiple of 64 rows.

    Args:
        config: the model's configuration, still with the language model's vocabulary.
        language: folder of the language model.

    Returns:
        The tokenizer with the two tokens; None if the folder has none.

    Raises:
        ValueError: the tokenizer has more tokens than the language model has embeddings.
    """
    known = config.text_config.vocab_size
    tokenizer = _load_tokenizer(language, known)
    image, pad = known, known + 1
    if tokenizer is not None:
        image, pad = tokenizer.convert_tokens_to_ids([IMAGE_TOKEN, PAD_TOKEN])
    rows = max(known, math.ceil((max(image, pad) + 1) / VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE)
    config.image_token_index = image
    config.text_config.vocab_size = rows
    config.pad_token_id = config.text_config.pad_token_id = pad
    return tokenizer


def _load_tokenizer(language: Path, rows: int) -> PreTrainedTokenizerBase | None:
    """Load the language model's tokenizer and append the image and padding tokens; None if it has no files."""
    if not any((language / name).is_file() for name in TOKENIZER_FILES):
        return None
    from transformers import AddedToken, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(language, padding_side="left")  # as generation in batches needs it
    if len(tokenizer) > rows:
        raise ValueError(f"language: {language} has a tokenizer of {len(tokenizer)} tokens, and embeddings of {rows}")
    tokenizer.add_tokens(AddedToken(IMAGE_TOKEN, special=True, normalized=False), special_tokens=True)
    tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
    return tokenizer


def _enlarge(weight: Tensor, rows: int) -> Tensor:
    """Append rows to embeddings, each the mean of the existing rows.

    The logit of such a token is a mean of logits, so greedy decoding never picks it.
    """
    mean = torch.zeros(weight.shape[1], dtype=torch.float64)
    for block in weight.split(4096):  # in blocks: all of it in double would be the largest tensor in memory
        mean += block.sum(0, dtype=torch.float64)
    grown = weight.new_empty(rows, weight.shape[1])
    grown[: len(weight)] = weight
    grown[len(weight) :] = mean / len(weight)
    return grown


# ----------------------------------------------------------------------------------------------------------- the files


def write_model(folder: Path, tensors: Mapping[str, Tensor], config: Any, processor: Any, shard_bytes: int) -> None:
    """Write a model's weights, its configurations and its processor.

    Args:
        folder: an empty folder.
        tensors: all tensors by their names on disk, the embeddings still without the new rows.
        config: the model's configuration, with its new vocabulary.
        processor: of images, and of texts where there is a tokenizer.
        shard_bytes: largest size of a file of weights, unless a single tensor is larger.
    """
    from transformers import GenerationConfig

    text = config.text_config
    _write_weights(folder, tensors, text.vocab_size, shard_bytes)
    config.save_pretrained(folder)
    ends = {name: getattr(text, name) for name in ("bos_token_id", "eos_token_id")}
    GenerationConfig(**ends, pad_token_id=config.pad_token_id).save_pretrained(folder)
    processor.save_pretrained(folder)


def _write_weights(folder: Path, tensors: Mapping[str, Tensor], rows: int, shard_bytes: int) -> None:
    """Write all tensors, a shard at a time.

    The tensors are mapped from their files, so no more than the two embeddings and one shard are in memory.
    """
    shapes = {  # on the meta device, where a tensor takes no memory
        name: torch.empty(
            (rows, tensor.shape[1]) if name in EMBEDDINGS else tensor.shape, dtype=tensor.dtype, device="meta"
        )
        for name, tensor in sorted(tensors.items())
    }
    split = split_torch_state_dict_into_shards(shapes, max_shard_size=shard_bytes)
    for file, names in split.filename_to_tensors.items():
        shard = {name: _enlarge(tensors[name], rows) if name in EMBEDDINGS else tensors[name] for name in names}
        save_tensors(folder / file, {name: tensor.contiguous() for name, tensor in shard.items()}, {"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True), "utf-8")
