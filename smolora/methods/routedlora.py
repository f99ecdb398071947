"""RoutedLoRA: the caller chooses the experts of each sequence, and their weights.

That covers a LoRA for each task, D-MoLE's weighted sum of several, and batches whose requests each have their own LoRA.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..arguments import check_int
from ..config import MixtureConfig
from ..spec import Bank, Slots, accurate_dtype
from .base import DropIn, Mixture, MixtureExperts, Prepared
from .checks import check_ids, check_tensor, reads_values
from .slices import FreezesExperts


@dataclass
class RoutedLoRAConfig(MixtureConfig, method="routedlora"):
    """Configuration of RoutedLoRA.

    Args:
        num_experts: number of LoRAs.
        r, lora_alpha, lora_dropout, target_modules, exclude_modules, modules_to_save: as in `MixtureConfig`.
    """

    takes: ClassVar[tuple[str, ...]] = ("experts", "weights")

    num_experts: int = field(default=8, metadata={"help": "number of experts"})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("num_experts", self.num_experts)


class SlotRouting(NamedTuple):
    """The experts of n sequences in K slots, as a forward used them."""

    ids: Tensor  # int32 (n, K); -1: an empty slot
    weights: Tensor | None  # (n, K); None: all 1
    logits: Tensor | None = None  # (n, E), of the router; None where the experts were given


class RoutedLoRAExperts(FreezesExperts, MixtureExperts):
    """Several LoRAs on one linear layer: y = W x + b + s sum_j w_j B_e A_e x with e = experts[j] of the sequence.

    Parameters (E experts):
        A (E, r, d) ~ N(0, 0.01^2), B (E, k, r) = 0. Frozen experts, and those that are not in the batch, keep their
        values under any optimiser.

    Buffers:
        frozen_experts: bool (E,), saved with the state.
    """

    config: RoutedLoRAConfig
    config_class = RoutedLoRAConfig
    A: Tensor
    B: Tensor
    frozen_experts: Tensor
    sliced = ("A", "B")
    mask_name = "frozen_experts"
    optional_state = ("frozen_experts",)

    def __init__(self, *args: Any, device: torch.device | None = None, **kwargs: Any) -> None:
        super().__init__(*args, device=device, **kwargs)
        self._add_mask(self.config.num_experts, device)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        E, r, d, k = self.config.num_experts, self.config.r, self.in_features, self.out_features
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
        return SlotRouting(last.ids[:, 0], last.slot_weights[:, 0])

    def freeze_experts(self, frozen: Tensor) -> None:
        """Freeze experts for good; experts that are frozen already stay frozen.

        They go on working where they are chosen: x and the weights get their gradients through them.

        Args:
            frozen: bool (E,).

        Raises:
            TypeError, ValueError: it is not.
        """
        self._freeze(frozen)

    def trained_slices(self) -> dict[str, int]:
        """Return the experts that are not frozen."""
        return dict.fromkeys(self.sliced, self._num_trained_experts())

    def facts(self) -> dict[str, Any]:
        return {"experts": self.config.num_experts}


class FusedRoutedLoRA(DropIn, RoutedLoRAExperts):
    """A linear layer with several LoRAs, chosen by the caller for each sequence; a drop-in for the `nn.Linear`."""


ROUTEDLORA = Mixture(
    "routedlora",
    RoutedLoRAConfig,
    RoutedLoRAExperts,
    FusedRoutedLoRA,
    "RoutedLoRA cannot be merged into the base: the experts depend on the sequence",
)
