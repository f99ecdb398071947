"""The sample that each image of a forward belongs to, for the layers that see images.

Most models give these layers one row for each image, or for each tile, with the same number of tokens. Some cut images
into tiles whose text has another number of placeholders, and some concatenate all images in one row; which ones do is
in `smolora.backbones.families`. The arguments of the forward are read before it begins, and what they do not tell is
refused.
"""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from ..backbones.families import ImageRows, family_of
from .packing import is_capturing, sums


def image_rows(model: Any) -> ImageRows:
    """Return how the layers that see images get them. Of a type that is not known, its arguments tell."""
    family = family_of(model.config)
    if family is not None and family.image_rows is not None:
        return family.image_rows
    if "image_grid_thw" in encoder_arguments(model):
        return "grid"
    return "sizes" if getattr(model.config.vision_config, "model_type", None) == "pixtral" else "images"


def encoder_arguments(model: Any) -> dict[str, inspect.Parameter]:
    """Return the parameters of a model's own method that encodes images, by name; empty if it has none."""
    encode = getattr(model, "get_image_features", None)
    return {} if encode is None else dict(inspect.signature(encode).parameters)


class Images:
    """The images of a forward with n samples.

    Args:
        ids: (B, S), the token ids; None if unknown.
        token: the id of the token that stands for a part of an image; None if unknown.
        samples: n; None if unknown.
        cu_seqlens: of samples that are packed in rows.
        given: (images,), the sample of each image, or of each tile; None if it is not given.
        rows: how the layers get them.
        count: how many images there are, if each is a row, or tiles that are flattened to one; None if unknown.
        tiles: how many rows each image has, if that differs.
        tokens: returns how many placeholders each image has, if that differs.
        pieces: the possible lengths of the images, in positions of a layer, if it gets them in one row.
        shown: (tiles,), 0 where a row is padding; None for all.
        error: raised by the first layer that gets images.
    """

    def __init__(
        self,
        ids: Tensor | None = None,
        token: int | None = None,
        *,
        samples: int | None = None,
        cu_seqlens: Tensor | None = None,
        given: Tensor | None = None,
        rows: ImageRows = "images",
        count: int | None = None,
        tiles: list[int] | None = None,
        tokens: Callable[[], list[int]] | None = None,
        pieces: list[list[int]] | None = None,
        shown: Tensor | None = None,
        error: ValueError | None = None,
    ) -> None:
        self.ids = None if token is None else ids
        self.token = token
        self.samples = samples
        self.samples_at = cu_seqlens
        self.given = given
        self.rows = rows
        self.count = count
        self.tiles = tiles
        self.tokens = tokens
        self.shown = shown
        self.error = error
        self.packed: list[tuple[int, Tensor]] | None = None
        if pieces is not None:
            self.packed = [
                (sum(lengths), torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)) for lengths in pieces
            ]
        self._owner: Tensor | None = None
        self._counts: Tensor | None = None
        self._found: list[int] | None = None
        self._fits: set[int] = set()

    def arrange(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Lay out a layer's input as (images, patches, d), or as (1, T, d) with the boundaries of its images.

        Raises:
            ValueError: nothing tells the images in x apart.
        """
        if self.error is not None:
            raise self.error
        if self.packed is not None:
            positions = math.prod(x.shape[:-1])
            for total, bounds in self.packed:
                if total == positions:
                    return x.reshape(1, positions, x.shape[-1]), bounds.to(x.device)
            raise ValueError(
                f"the images of this forward have {' or '.join(str(total) for total, _ in self.packed)} positions by "
                f"their sizes, but the layer got {positions}, which cannot be told apart: leave it out of "
                "target_modules (videos are not supported)"
            )
        if self.rows == "flat" and x.dim() == 2 and self.count and x.shape[0] % self.count == 0:
            return x.view(self.count, -1, x.shape[1]), None
        if self.rows == "samples" and x.dim() > 3:
            return x.flatten(0, -3), None
        if x.dim() < 3 or (x.dim() == 3 and x.shape[0] == 1 and (self.count or 1) > 1):
            raise ValueError(
                f"the layer got images in one row, shape {tuple(x.shape)}, and nothing tells where each begins: leave "
                "it out of target_modules"
            )
        return (x if x.dim() == 3 else x.flatten(1, -2)), None

    def owners(self, rows: int) -> Tensor:
        """Return the sample (rows,) of each image that a layer gets.

        Raises:
            ValueError: nothing tells it, or the placeholders in the text do not fit the images.
        """
        if self.samples == 1:
            return torch.zeros(rows, dtype=torch.long)
        self.find_owners()
        if self._owner is not None:
            if self._owner.shape[0] != rows:
                raise ValueError(
                    f"image_to_sample must name the sample of each of the {rows} images, got {self._owner.shape[0]} "
                    "entries"
                )
            return self._owner
        counts = self.counts
        if self.rows == "samples" and self.samples is not None:
            return torch.arange(self.samples).repeat_interleave(rows // self.samples)
        if counts is None:
            raise ValueError(untold(rows))
        reads = not torch.compiler.is_compiling() and not is_capturing(counts)
        if rows and reads and rows not in self._fits:
            found = self.found()
            if self.is_blank(rows):
                return torch.zeros(rows, dtype=torch.long)
            each, rest = divmod(sum(found), rows)
            if rest or not each or any(count % each for count in found):
                raise ValueError(
                    f"{rows} images do not fit the image tokens in input_ids, {found} in each sample: give "
                    "image_to_sample, the sample of each image"
                )
            self._fits.add(rows)
        each = counts.sum() // max(rows, 1)
        first = torch.arange(rows, device=counts.device) * each  # an image's first placeholder
        return torch.searchsorted(counts.cumsum(0), first, right=True).clamp_(max=counts.shape[0] - 1)

    def shown_owners(self, rows: int) -> Tensor:
        """Return what `owners` does, with -1 for rows that are padding."""
        owners = self.owners(rows)
        if self.is_blank(rows):
            return torch.full_like(owners, -1)
        if self.shown is None or self.shown.shape[0] != rows:
            return owners
        return owners.masked_fill(self.shown.to(owners.device) == 0, -1)

    def is_blank(self, rows: int) -> bool:
        """Return whether the only image is one that no text shows, for a model that cannot do without, as BLIP-2."""
        if rows != 1 or self.given is not None or self.counts is None:
            return False
        return not torch.compiler.is_compiling() and not is_capturing(self.counts) and not any(self.found())

    def find_owners(self) -> None:
        """Find the sample of each row where images differ in rows or tokens, or where it is given.

        Raises:
            ValueError: nothing tells it, or what is given does not fit the images.
        """
        if self._owner is not None or (self.given is None and self.tokens is None):
            return
        owner = torch.tensor(self._in_order(self.tokens())) if self.given is None else self.given
        if self.tiles is not None and (self.given is None or owner.shape[0] != sum(self.tiles)):
            self._check(owner, len(self.tiles), f", or of each of their {sum(self.tiles)} tiles")
            owner = owner.repeat_interleave(torch.tensor(self.tiles, device=owner.device))
        elif self.packed is not None:
            self._check(owner, self.packed[0][1].shape[0] - 1)
        self._owner = owner

    def _check(self, owner: Tensor, images: int, tiles: str = "") -> None:
        if owner.shape[0] != images:
            raise ValueError(
                f"image_to_sample must name the sample of each of the {images} images{tiles}, got {owner.shape[0]} "
                "entries"
            )

    def _in_order(self, tokens: list[int]) -> list[int]:
        """Assign images to samples in order, given the number of placeholders of each image."""
        if self.counts is None:
            raise ValueError(untold(len(tokens)))
        owner: list[int] = []
        count = 0
        for sample, count in enumerate(self.found()):
            while count > 0 and len(owner) < len(tokens):
                count -= tokens[len(owner)]
                owner.append(sample)
            if count:
                break
        if count or len(owner) < len(tokens):
            raise ValueError(
                f"{len(tokens)} images of {tokens} tokens do not fit the image tokens in input_ids, {self.found()} in "
                "each sample: give image_to_sample, the sample of each image"
            )
        return owner

    @property
    def counts(self) -> Tensor | None:
        """The placeholders of images in each sample (n,); None if unknown. They are counted when first asked for."""
        if self._counts is None and self.ids is not None:
            self._counts = sums(self.ids == self.token, self.samples_at)
        return self._counts

    def found(self) -> list[int]:
        """Return the values of `counts`. They are read once a forward; transformers' models read them too."""
        if self._found is None:
            self._found = self.counts.tolist()
        return self._found


def untold(images: int) -> str:
    """Return the message for images whose samples nothing tells."""
    return (
        f"image_to_sample must be given, the sample of each of the {images} images: without input_ids nothing tells "
        "which instruction an image belongs to"
    )


def images_of(model: nn.Module, inputs: dict[str, Any], told: bool, given: Tensor | None, **known: Any) -> Images:
    """Read the images of a forward from its arguments.

    Args:
        model: the model with adapters.
        inputs: the forward's arguments by name.
        told: whether the sample of each image must be known, because instructions differ.
        given: `image_to_sample`.
        known: other arguments of `Images`.

    Raises:
        ValueError: `told`, and nothing tells it.
    """
    pixels = inputs.get("pixel_values")
    rows = image_rows(model)
    if inputs.get("pixel_values_videos") is not None and (
        (pixels is not None and rows == "grid") or (told and given is None)
    ):
        raise ValueError(
            "pixel_values_videos must be left out where a layer that sees images is adapted: nothing tells which "
            "sample a frame belongs to (image_to_sample can, where a frame is a row, and there are no images beside)"
        )
    known = {**known, "given": given, "rows": rows}
    if pixels is not None:
        known |= _layout(model, rows, pixels, inputs)
    elif rows == "flat" and (inputs.get("mm_encoder_outputs") or {}).get("image") is not None:
        # `generate` runs the tower before the first forward, which runs the connector
        known["count"] = inputs["mm_encoder_outputs"]["image"].last_hidden_state.shape[0]
    images = Images(**known)
    if told:
        images.find_owners()
    return images


def _layout(model: Any, rows: ImageRows, pixels: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of `Images` that depend on how a model gets its images."""
    vision, sizes = getattr(model.config, "vision_config", None), inputs.get("image_sizes")
    if rows == "samples":
        mask = inputs.get("aspect_ratio_mask")
        return {"samples": pixels.shape[0], "shown": None if mask is None else mask.flatten()}
    if rows == "grid" and inputs.get("image_grid_thw") is not None:
        patches = [math.prod(size) for size in _values(inputs["image_grid_thw"])]
        merged = [n // getattr(vision, "spatial_merge_size", 1) ** 2 for n in patches]
        return {"pieces": [merged, patches], "tokens": lambda: merged}
    if rows == "sizes":
        of_image = _values([pixels.shape[-2:]] * len(pixels) if sizes is None else sizes)
        patch, merge = vision.patch_size, getattr(model.config, "spatial_merge_size", 1)
        pieces = [[(h // step) * (w // step) for h, w in of_image] for step in (patch * merge, patch)]
        return {"pieces": pieces, "tokens": lambda: pieces[0]}
    if rows == "tiles" and sizes is not None:
        tiles = tiles_of(model.config, sizes, inputs.get("batch_num_images"))
        return {"tiles": tiles, "tokens": lambda: _tokens_of_tiles(model, sizes, tiles)}
    return {"count": pixels.shape[0] if isinstance(pixels, Tensor) and pixels.dim() == 4 else None}


def _values(sizes: Any) -> list[list[int]]:
    """Return sizes as integers; transformers' models read them in the same forward."""
    return sizes.tolist() if isinstance(sizes, Tensor) else [list(map(int, size)) for size in sizes]


def tiles_of(config: Any, sizes: Any, per_sample: Any) -> list[int]:
    """Return how many rows each image has, as the model counts them."""
    modeling = importlib.import_module(f"transformers.models.{config.model_type}.modeling_{config.model_type}")
    cut = [True] * len(sizes)
    if per_sample is not None:  # LLaVA-OneVision cuts an image only if it is its sample's only one
        cut = [n == 1 for n in map(int, per_sample) for _ in range(n)]
    return [
        modeling.image_size_to_num_patches(size, config.image_grid_pinpoints, config.vision_config.image_size)
        if whole
        else 1
        for size, whole in zip(_values(sizes), cut, strict=True)
    ]


def _tokens_of_tiles(model: nn.Module, sizes: Any, tiles: list[int]) -> list[int]:
    """Return how many placeholders each image has, from the model's own function on tiles of one channel."""
    vision, inner = model.config.vision_config, getattr(model, "model", model)
    patches = (vision.image_size // vision.patch_size) ** 2
    options = {
        "vision_feature_select_strategy": getattr(model.config, "vision_feature_select_strategy", "default"),
        "vision_aspect_ratio": getattr(model.config, "vision_aspect_ratio", None),
    }
    takes = inspect.signature(inner.pack_image_features).parameters
    features, _ = inner.pack_image_features(
        [torch.zeros(n, patches, 1) for n in tiles],
        torch.tensor(_values(sizes)),
        image_newline=torch.zeros(1),
        **{name: value for name, value in options.items() if name in takes},
    )
    return [feature.shape[0] for feature in features]
