"""The sample that each image of a forward belongs to, for the layers that see images.

Most models give these layers one row for each image, or for each tile, with the same number of tokens. Some cut images
into tiles whose text has another number of placeholders, and some concatenate all images in one row. The arguments of
the forward are read before it begins, and what they do not tell is refused.
"""

from __future__ import annotations

import importlib
import inspect
import math
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from .packing import is_capturing, sums

BLANK_TOWERS = ("clip_vision_model", "siglip_vision_model", "pixtral", "internvl_vision")  # see `blank_image`
TILED = ("llava_next", "llava_next_video", "llava_onevision")  # the number of rows of an image depends on its size


class Images:
    """The images of a forward with n samples.

    Args:
        ids: (B, S), the token ids; None if unknown.
        token: the id of the token that stands for a part of an image; None if unknown.
        samples: n; None if unknown.
        cu_seqlens: of samples that are packed in rows.
        owner: (images,), the sample of each image; None if unknown.
        images: how many images there are, if each is a row; None if unknown.
        pieces: the possible lengths of the images, in positions of a layer, if it gets them in one row.
        error: raised by the first layer that gets images.
    """

    def __init__(
        self,
        ids: Tensor | None = None,
        token: int | None = None,
        *,
        samples: int | None = None,
        cu_seqlens: Tensor | None = None,
        owner: Tensor | None = None,
        images: int | None = None,
        pieces: list[list[int]] | None = None,
        error: ValueError | None = None,
    ) -> None:
        self.ids = None if token is None else ids
        self.token = token
        self.samples = samples
        self.samples_at = cu_seqlens
        self.owner = owner
        self.images = images
        self.error = error
        self.packed: list[tuple[int, Tensor]] | None = None
        if pieces is not None:
            self.packed = [
                (sum(lengths), torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)) for lengths in pieces
            ]
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
                "target_modules (videos and packed vision towers are not supported)"
            )
        if x.dim() < 3 or (x.dim() == 3 and x.shape[0] == 1 and (self.images or 1) > 1):
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
        if self.owner is not None:
            if self.owner.shape[0] != rows:
                raise ValueError(
                    f"image_to_sample must name the sample of each of the {rows} images, got {self.owner.shape[0]} "
                    "entries"
                )
            return self.owner
        counts = self.counts
        if self.samples == 1:
            return torch.zeros(rows, dtype=torch.long)
        if counts is None:
            raise ValueError(untold(rows))
        reads = not torch.compiler.is_compiling() and not is_capturing(counts)
        if rows and reads and rows not in self._fits:
            found = self.found()
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
    config, plain = model.config, Images(**known, owner=given)
    pixels, grid, sizes = (inputs.get(name) for name in ("pixel_values", "image_grid_thw", "image_sizes"))
    if inputs.get("pixel_values_videos") is not None and (grid is not None or (told and given is None)):
        raise ValueError(
            "pixel_values_videos must be left out where a layer that sees images is adapted: nothing tells which "
            "sample a frame belongs to (image_to_sample can, where a frame is a row, and there are no images beside)"
        )
    if pixels is None:
        return plain
    pieces, rows = None, None
    if grid is not None:
        merge = getattr(config.vision_config, "spatial_merge_size", 1)
        patches = [math.prod(size) for size in _values(grid)]
        pieces = [[n // merge**2 for n in patches], patches]
        tokens = pieces[0]
    elif getattr(getattr(config, "vision_config", None), "model_type", None) == "pixtral":
        if sizes is None:
            sizes = [pixels.shape[-2:]] * len(pixels)
        patch, merge = config.vision_config.patch_size, getattr(config, "spatial_merge_size", 1)
        pieces = [[(h // step) * (w // step) for h, w in _values(sizes)] for step in (patch * merge, patch)]
        tokens = pieces[0]
    elif sizes is not None and getattr(config, "model_type", None) in TILED:
        rows = _tiles(config, sizes, inputs.get("batch_num_images"))
        if told and given is not None and given.shape[0] == sum(rows):  # of each tile
            return plain
        tokens = _tokens_of_tiles(model, sizes, rows) if told and given is None else rows
    else:
        images = pixels.shape[0] if isinstance(pixels, Tensor) and pixels.dim() == 4 else None
        return Images(**known, owner=given, images=images)
    owner = None
    if told and given is None:
        owner = torch.tensor(_in_order(plain, tokens))
    elif told:
        if given.shape[0] != len(tokens):
            raise ValueError(
                f"image_to_sample must name the sample of each of the {len(tokens)} images"
                f"{'' if rows is None else f', or of each of their {sum(rows)} tiles'}, got {given.shape[0]} entries"
            )
        owner = given
    if owner is not None and rows is not None:
        owner = owner.repeat_interleave(torch.tensor(rows, device=owner.device))
    return Images(**known, owner=owner, pieces=pieces)


def _values(sizes: Any) -> list[list[int]]:
    """Return sizes as integers; transformers' models read them in the same forward."""
    return sizes.tolist() if isinstance(sizes, Tensor) else [list(map(int, size)) for size in sizes]


def _in_order(plain: Images, tokens: list[int]) -> list[int]:
    """Assign images to samples in order, given the number of placeholders of each image."""
    if plain.counts is None:
        raise ValueError(untold(len(tokens)))
    owner: list[int] = []
    count = 0
    for sample, count in enumerate(plain.found()):
        while count > 0 and len(owner) < len(tokens):
            count -= tokens[len(owner)]
            owner.append(sample)
        if count:
            break
    if count or len(owner) < len(tokens):
        raise ValueError(
            f"{len(tokens)} images of {tokens} tokens do not fit the image tokens in input_ids, {plain.found()} in "
            "each sample: give image_to_sample, the sample of each image"
        )
    return owner


def _tiles(config: Any, sizes: Any, per_sample: Any) -> list[int]:
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


def takes_blank_image(model: nn.Module) -> bool:
    """Return whether `blank_image` knows the images that a model takes."""
    return _takes_grid(model) or model.config.vision_config.model_type in BLANK_TOWERS


def blank_image(model: nn.Module, like: Tensor) -> dict[str, Any]:
    """Return the arguments of `get_image_features` for one small blank image, in like's dtype and on its device."""
    config, vision = model.config, model.config.vision_config
    if _takes_grid(model):
        merge, channels = vision.spatial_merge_size, getattr(vision, "in_channels", 3)
        patch = channels * vision.temporal_patch_size * vision.patch_size**2
        grid = torch.tensor([[1, merge, merge]], device=like.device)
        return {"pixel_values": like.new_zeros((merge**2, patch)), "image_grid_thw": grid}
    side = vision.image_size
    if vision.model_type == "pixtral":
        side = 2 * vision.patch_size * getattr(config, "spatial_merge_size", 1)  # Mistral 3 fails on a single token
    height, width = side if isinstance(side, list | tuple) else (side, side)
    size = torch.tensor([[height, width]])
    shape = (vision.num_channels, height, width)
    if config.model_type in TILED:
        (tiles,) = _tiles(config, size, None)
        shape = (tiles, *shape)
    inputs = {"pixel_values": like.new_zeros((1, *shape))}
    if vision.model_type == "pixtral" or config.model_type in TILED:
        inputs["image_sizes"] = size.to(like.device)
    return inputs


def _takes_grid(model: nn.Module) -> bool:
    """Return whether a model takes its images as patches in one row, as Qwen2-VL does."""
    return "image_grid_thw" in inspect.signature(model.get_image_features).parameters
