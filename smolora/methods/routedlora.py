"""RoutedLoRA: the caller chooses the experts of each sequence, and their weights.

That covers a LoRA for each task, D-MoLE's weighted sum of several, and batches whose requests each have their own LoRA.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..arguments import check_int, is_int
from ..config import MixtureConfig
from ..spec import Bank, Slots, accurate_dtype
from .autoencoder_router import AutoencoderRouter
from .base import DropIn, Mixture, MixtureExperts, Prepared
from .checks import check_ids, check_tensor, reads_values
from .slices import FreezesExperts


@dataclass
class RoutedLoRAConfig(MixtureConfig, method="routedlora"):
    """Configuration of RoutedLoRA.

    Args:
        num_experts: number of LoRAs.
        placement: the experts that a layer has, by their numbers; None for all. For a whole model, those of each layer
            by its name, as D-MoLE's allocator gives them; a layer that is not named has no expert.
        router_hidden: units of each autoencoder of D-MoLE's router, which finds the experts in a whole model (see
            `AutoencoderRouter`); None: it has no router, and experts are always given.
        instruction_dim: size of the router's text features, the embeddings of whole questions.
        image_dim: size of its image features, of the model's vision tower; None: as the model says.
        r, lora_alpha, lora_dropout, target_modules, exclude_modules, modules_to_save: as in `MixtureConfig`.
    """

    takes: ClassVar[tuple[str, ...]] = ("experts", "weights")

    @property
    def finds_by_question(self) -> bool:
        return self.router_hidden is not None

    num_experts: int = field(default=8, metadata={"help": "number of experts"})
    placement: list[int] | dict[str, list[int]] | None = field(
        default=None, metadata={"help": "the experts that a layer has, or those of each layer by its name"}
    )
    router_hidden: int | None = field(default=None, metadata={"help": "units of the router's autoencoders"})
    instruction_dim: int = field(default=384, metadata={"help": "size of the router's text features"})
    image_dim: int | None = field(default=None, metadata={"help": "size of the router's image features"})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("num_experts", self.num_experts)
        check_int("instruction_dim", self.instruction_dim)
        for name, least in (("router_hidden", 1), ("image_dim", 0)):
            if getattr(self, name) is not None:
                check_int(name, getattr(self, name), least)
        by_layer = self.placement if isinstance(self.placement, dict) else {"": self.placement}
        for layer, experts in by_layer.items():
            if experts is not None:
                _check_placement(f"placement[{layer!r}]" if layer else "placement", experts, self.num_experts)

    def for_layer(self, key: str) -> RoutedLoRAConfig | None:
        """Return the configuration of the layer named `key` in the model; None if no expert is placed there."""
        if not isinstance(self.placement, dict):
            return self
        if not self.placement.get(key):
            return None
        config = copy.copy(self)
        config.placement = self.placement[key]
        return config

    def check_layers(self, adapted: Iterable[str]) -> None:
        """Check that all layers with experts are there.

        Args:
            adapted: names of the layers that the model adapts.

        Raises:
            ValueError: `placement` names another one.
        """
        unknown = sorted(set(self.placement) - set(adapted)) if isinstance(self.placement, dict) else []
        if unknown:
            raise ValueError(f"placement must name layers that target_modules select, got {unknown[0]!r}")


def _check_placement(name: str, experts: Sequence[int], below: int) -> None:
    """Check the experts of a layer.

    Raises:
        ValueError: they are not different numbers of experts in ascending order.
    """
    numbers = isinstance(experts, list) and all(is_int(e, 0) and e < below for e in experts)
    if not numbers or any(a >= b for a, b in itertools.pairwise(experts)):
        raise ValueError(
            f"{name} must be a list of different numbers of experts, 0 to {below - 1}, in ascending order, "
            f"got {experts!r}"
        )


class SlotRouting(NamedTuple):
    """The experts of n sequences in K slots, as a forward used them."""

    ids: Tensor  # int32 (n, K); -1: an empty slot
    weights: Tensor | None  # (n, K); None: all 1
    logits: Tensor | None = None  # (n, E), of the router; None where the experts were given


class RoutedLoRAExperts(FreezesExperts, MixtureExperts):
    """Several LoRAs on one linear layer: y = W x + b + s sum_j w_j B_e A_e x with e = experts[j] of the sequence.

    An expert that the layer does not have (see `placement`) adds nothing.

    Parameters (E experts in the layer):
        A (E, r, d) ~ N(0, 0.01^2), B (E, k, r) = 0. Frozen experts, and those that are not in the batch, keep their
        values under any optimiser.

    Buffers, saved with the state:
        frozen_experts: bool (E,).
        slot_of: int32 (num_experts,), the place in A and B of each expert, -1 for one that the layer does not have;
            None without a `placement`.

    Attributes:
        expert_ids: numbers of the layer's experts, in the order of A and B.
    """

    config: RoutedLoRAConfig
    config_class = RoutedLoRAConfig
    A: Tensor
    B: Tensor
    frozen_experts: Tensor
    slot_of: Tensor | None
    sliced = ("A", "B")
    mask_name = "frozen_experts"
    optional_state = ("frozen_experts",)

    def __init__(
        self,
        in_features: int,
        out_features: int,
        config: RoutedLoRAConfig,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if isinstance(config.placement, dict) or config.placement == []:
            raise ValueError(f"placement must be the experts of this layer, at least one, got {config.placement!r}")
        self.expert_ids = list(range(config.num_experts)) if config.placement is None else list(config.placement)
        super().__init__(in_features, out_features, config, device=device, dtype=dtype)
        self._add_mask(len(self.expert_ids), device)
        self.register_buffer("slot_of", None)
        if config.placement is not None:
            slots = [self.expert_ids.index(e) if e in self.expert_ids else -1 for e in range(config.num_experts)]
            self.slot_of = torch.tensor(slots, dtype=torch.int32, device=device)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        E, r, d, k = len(self.expert_ids), self.config.r, self.in_features, self.out_features
        return {"A": (E, r, d), "B": (E, k, r)}

    def prepare(
        self,
        x: Tensor,
        experts: Tensor,
        weights: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
    ) -> Prepared:
        """Check a call and translate it for the engine.

        Args:
            x: (B, S, d), or packed (T, d) or (1, T, d) with `cu_seqlens`.
            experts: int (n, c), the experts of each sequence; -1 for an empty slot.
            weights: floating point (n, c), possibly with a gradient; by default 1.
            cu_seqlens: int32 (n + 1,), boundaries of packed sequences.

        Raises:
            TypeError, ValueError: see `MixtureExperts.prepare`.
        """
        batch = self.batch(x, cu_seqlens)
        trained = self._trained()
        banks = [Bank(self.A, self.B, trained=trained, trained_A=trained)]
        return Prepared(batch, banks, {"slots": self._slots(experts, weights, batch)})

    def _slots(self, experts: Tensor, weights: Tensor | None, batch: Any) -> Slots:
        """Check the slots. Those that are empty in every sequence are left out, if reading them does not sync."""
        n = batch.tokens.num_seqs
        ids = check_ids("experts", experts, ((n, "c"),), self.A.device, below=self.config.num_experts, least=-1).int()
        check_tensor("weights", weights, self.A.device)
        if weights is not None:
            if not weights.is_floating_point() or weights.shape != ids.shape:
                raise ValueError(
                    f"weights must be floating point of shape {tuple(ids.shape)}, as experts, got {weights.dtype} of "
                    f"{tuple(weights.shape)}"
                )
            weights = weights.to(accurate_dtype(batch.x.dtype))
        if self.slot_of is not None:
            here = (ids >= 0) & (ids < self.config.num_experts)
            ids = torch.where(here, self.slot_of[torch.where(here, ids, 0).long()], -1)
        if ids.shape[1] == 0:  # no expert at all is a slot that is empty
            ids = ids.new_full((n, 1), -1)
            weights = None if weights is None else weights.new_zeros((n, 1))
        if reads_values(ids):
            used = ids >= 0
            if weights is not None and not weights.requires_grad:
                used = used & (weights != 0)
            used = used.any(0)
            if not bool(used.all()):
                used[0] = used[0] | ~used.any()
                ids, weights = ids[:, used], None if weights is None else weights[:, used]
        if weights is None:
            weights = (ids >= 0).to(accurate_dtype(batch.x.dtype))
        return Slots(ids[:, None].contiguous(), weights[:, None])

    def last_routing(self) -> SlotRouting:
        """Return the experts and weights of the last forward; slots that no sequence used are left out.

        Raises:
            RuntimeError: there was no forward yet.
        """
        last = self._decided("last_routing()")
        assert last.ids is not None and last.slot_weights is not None  # slots were given
        ids = last.ids[:, 0]
        if self.slot_of is not None:
            placed = ids.new_tensor(self.expert_ids)
            ids = torch.where(ids >= 0, placed[ids.clamp(min=0).long()], -1)
        return SlotRouting(ids, last.slot_weights[:, 0])

    def freeze_experts(self, frozen: Tensor) -> None:
        """Freeze experts for good; experts that are frozen already stay frozen.

        They go on working where they are chosen: x and the weights get their gradients through them.

        Args:
            frozen: bool (E,), the experts in the layer, as `expert_ids` has them.

        Raises:
            TypeError, ValueError: it is not.
        """
        self._freeze(frozen)

    def trained_slices(self) -> dict[str, int]:
        """Return the experts that are not frozen."""
        return dict.fromkeys(self.sliced, self._num_trained_experts())

    def facts(self) -> dict[str, Any]:
        experts = self.config.num_experts
        return {"experts": experts if len(self.expert_ids) == experts else f"{len(self.expert_ids)} of {experts}"}


class FusedRoutedLoRA(DropIn, RoutedLoRAExperts):
    """A linear layer with several LoRAs, chosen by the caller for each sequence; a drop-in for the `nn.Linear`."""


ROUTEDLORA = Mixture(
    "routedlora",
    RoutedLoRAConfig,
    RoutedLoRAExperts,
    FusedRoutedLoRA,
    "RoutedLoRA cannot be merged into the base: the experts depend on the sequence",
    selector=AutoencoderRouter.of_adapter,
)
