"""D-MoLE's router: an autoencoder for each task recognises the task's samples by how well it reconstructs them."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ..arguments import check_int, is_number
from .checks import reads_values
from .selector import Features, Selector

FIRST_RATE, LAST_RATE, BATCH_SIZE = 5e-3, 1e-3, 1024
# Steps without a lower loss. The released code waits 10 epochs, of 11 batches on its 8 GPUs. Ten epochs of a few
# batches end within the plateau at the start, where all outputs are near zero.
PATIENCE = 110


class AutoencoderRouter(Selector):
    """Chooses the experts of samples by their features, for adapters with an expert for each task (D-MoLE).

    A sample's error for a task is the mean squared error of its feature's reconstruction, d -> hidden ReLU -> d
    Sigmoid. Only tasks whose error is below their threshold come into question. That of the lowest error is the
    sample's; its expert answers together with the expert that it was trained with, if there was one. Without a task
    below its threshold no expert answers, so the sample gets the pretrained model.

    The feature of a sample is the concatenation of its image's and its question's, each scaled to length 1, and then
    itself scaled to length 1. What a sample lacks is zeros in it.

    Args:
        num_tasks: T, tasks that each have an expert of the same number.
        image_dim, text_dim: sizes of the features of images and questions; d is their sum.
        hidden: units of an autoencoder.

    Buffers, saved with the adapter:
        encoder (T, hidden, d), encoder_bias (T, hidden), decoder (T, d, hidden), decoder_bias (T, d).
        threshold (T,): a quantile of the errors of the task's own samples; -1 for a task that is not fitted yet.
        companion (T,), int64: the earlier task whose expert the task's is trained with; -1 for none.
    """

    finds: ClassVar[tuple[str, ...]] = ("experts", "task")
    encoder: Tensor
    encoder_bias: Tensor
    decoder: Tensor
    decoder_bias: Tensor
    threshold: Tensor
    companion: Tensor

    def __init__(
        self, num_tasks: int, image_dim: int, text_dim: int, hidden: int = 128, *, device: torch.device | None = None
    ) -> None:
        super().__init__()
        for name, value in (("num_tasks", num_tasks), ("text_dim", text_dim), ("hidden", hidden)):
            check_int(name, value)
        check_int("image_dim", image_dim, least=0)
        self.num_tasks, self.image_dim, self.text_dim = num_tasks, image_dim, text_dim
        features = image_dim + text_dim
        for name, shape in {
            "encoder": (num_tasks, hidden, features),
            "encoder_bias": (num_tasks, hidden),
            "decoder": (num_tasks, features, hidden),
            "decoder_bias": (num_tasks, features),
        }.items():
            self.register_buffer(name, torch.zeros(shape, device=device))
        self.register_buffer("threshold", torch.full((num_tasks,), -1.0, device=device))
        self.register_buffer("companion", torch.full((num_tasks,), -1, dtype=torch.int64, device=device))

    @classmethod
    def of_adapter(cls, config: Any, device: torch.device) -> AutoencoderRouter | None:
        """Return the router of a new RoutedLoRA adapter; None if it has none."""
        if config.router_hidden is None:
            return None
        return cls(config.num_experts, config.image_dim, config.instruction_dim, config.router_hidden, device=device)

    # ---- answering

    @property
    def is_ready(self) -> bool:
        return bool((self.threshold >= 0).any())

    def choose(self, features: Features) -> dict[str, Tensor]:
        """Return the experts of each sample, as `experts` does, and its task (n,), -1 for none."""
        found = self.experts(features)
        return {"experts": found, "task": found[:, 0]}

    def experts(self, features: Features) -> Tensor:
        """Return the experts of each sample, int64 (n, 2): its task's, and that one's companion; -1 for none.

        Raises:
            TypeError, ValueError: the features do not fit.
        """
        task = self.select(features)
        companion = torch.where(task >= 0, self.companion.to(task.device)[task.clamp(min=0)], -1)
        return torch.stack([task, companion], 1)

    def select(self, features: Features, before: int | None = None) -> Tensor:
        """Return the task of each sample, int64 (n,): the lowest error of those below their thresholds; -1 for none.

        Args:
            features: of n samples.
            before: choose among the tasks before this one; None for all.

        Raises:
            TypeError, ValueError: the features do not fit.
        """
        errors = self.errors(features)[:, :before]
        if not errors.shape[1]:
            return torch.full((len(errors),), -1, device=errors.device)
        errors = errors.masked_fill(errors >= self.threshold[:before].to(errors.device), math.inf)
        lowest, task = errors.min(1)
        return torch.where(lowest.isinf(), -1, task)

    @torch.no_grad()
    def errors(self, features: Features) -> Tensor:
        """Return each task's reconstruction error of each sample, (n, T), infinite for a task that is not fitted.

        Raises:
            TypeError, ValueError: the features do not fit.
        """
        x = self.joint(features)
        found = x.new_full((len(x), self.num_tasks), math.inf)
        for task in (self.threshold >= 0).nonzero().flatten().tolist():
            found[:, task] = reconstruction_errors(x, *(weight[task].to(x.device) for weight in self._weights()))
        return found

    @torch.no_grad()
    def joint(self, features: Features) -> Tensor:
        """Return the joint feature of each sample, float32 (n, d).

        Raises:
            TypeError, ValueError: the features are no finite floating point (n, image_dim) and (n, text_dim), or there
                are none.
        """
        given = [part for part in features if part is not None]
        if not given:
            raise ValueError("image or text features must be given, got neither")
        rows = given[0].shape[0]
        parts = []
        for name, part, dim in zip(features._fields, features, (self.image_dim, self.text_dim), strict=True):
            if part is None:
                parts.append(given[0].new_zeros((rows, dim), dtype=torch.float32))
                continue
            if not part.is_floating_point():
                raise TypeError(f"{name} features must be floating point, got {part.dtype}")
            if tuple(part.shape) != (rows, dim):
                raise ValueError(f"{name} features must have shape ({rows}, {dim}), got {tuple(part.shape)}")
            if reads_values(part) and not bool(part.isfinite().all()):
                raise ValueError(f"{name} features must be finite, got NaN or infinity")
            parts.append(F.normalize(part.float(), dim=1).to(given[0].device))
        return F.normalize(torch.cat(parts, 1), dim=1)

    # ---- training

    def choose_companion(self, task: int, features: Features, least_share: float = 0.3) -> int:
        """Choose the earlier expert that a task's expert is trained with, and keep it as its `companion`.

        The task's samples vote for the earlier tasks. Samples that are below no threshold do not vote.

        Args:
            task: the task.
            features: of its training samples.
            least_share: of the votes, that the most voted task needs.

        Returns:
            The most voted task; -1 if it has too small a share, or nothing votes.

        Raises:
            ValueError: an argument does not fit.
        """
        self._check_task(task)
        shares = vote_shares(self.select(features, before=task))
        self.companion[task] = shares[0][0] if shares and shares[0][1] >= least_share else -1
        return int(self.companion[task])

    def fit(
        self, task: int, features: Features, *, quantile: float = 0.99, max_epochs: int = 1000, seed: int = 0
    ) -> int:
        """Train a task's autoencoder, on the CPU, and set its threshold.

        Adam, from 5e-3 to 1e-3 by a cosine over `max_epochs`, in batches of 1,024; it stops after 110 steps without
        an epoch of lower loss. The same arguments give the same bits.

        Args:
            task: the task.
            features: of its training samples.
            quantile: of their errors, which becomes the threshold.
            max_epochs: epochs at most.
            seed: of the initial weights and of the batches.

        Returns:
            The number of epochs.

        Raises:
            ValueError: an argument does not fit.
        """
        self._check_task(task)
        check_int("max_epochs", max_epochs)
        if not is_number(quantile) or not 0 < quantile <= 1:
            raise ValueError(f"quantile must be above 0 and at most 1, got {quantile!r}")
        x = self.joint(features).cpu()
        if not len(x):
            raise ValueError("features must be those of a sample or more, got none")
        generator = torch.Generator().manual_seed(seed)
        weights = []
        for name, buffer in zip(("encoder", "encoder", "decoder", "decoder"), self._weights(), strict=True):
            bound = getattr(self, name).shape[-1] ** -0.5  # as nn.Linear
            weights.append(torch.empty(buffer.shape[1:]).uniform_(-bound, bound, generator=generator).requires_grad_())
        with torch.enable_grad():
            epochs = _train(x, weights, max_epochs, generator)
        with torch.no_grad():
            own = reconstruction_errors(x, *weights)
            self.threshold[task] = torch.quantile(own.double(), quantile).float()
            for buffer, weight in zip(self._weights(), weights, strict=True):
                buffer[task] = weight
        return epochs

    def _weights(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.encoder, self.encoder_bias, self.decoder, self.decoder_bias

    def _check_task(self, task: int) -> None:
        if not 0 <= task < self.num_tasks:
            raise ValueError(f"task must be one of the router's, 0 to {self.num_tasks - 1}, got {task!r}")

    def extra_repr(self) -> str:
        sizes = f"image_dim={self.image_dim}, text_dim={self.text_dim}, hidden={self.encoder.shape[1]}"
        return f"num_tasks={self.num_tasks}, {sizes}"


def vote_shares(votes: Tensor) -> list[tuple[int, float]]:
    """Return the tasks that were voted for, each with its share of the votes, the most voted first.

    Args:
        votes: int (n,); -1 is no vote. Of tasks with as many votes the smaller number comes first.
    """
    tasks, counts = votes[votes >= 0].unique(return_counts=True)
    order = torch.sort(counts, descending=True, stable=True).indices
    total = max(int(counts.sum()), 1)
    return [(int(tasks[i]), int(counts[i]) / total) for i in order.tolist()]


def reconstruction_errors(
    x: Tensor, encoder: Tensor, encoder_bias: Tensor, decoder: Tensor, decoder_bias: Tensor
) -> Tensor:
    """Return the mean squared error (n,) of the reconstruction of x (n, d) by one autoencoder."""
    hidden = torch.relu(F.linear(x, encoder, encoder_bias))
    return (torch.sigmoid(F.linear(hidden, decoder, decoder_bias)) - x).square().mean(1)


def _train(x: Tensor, weights: list[Tensor], max_epochs: int, generator: torch.Generator) -> int:
    """Train an autoencoder's weights in place; return the number of epochs."""
    optimizer = torch.optim.Adam(weights, lr=FIRST_RATE)
    best, waited = math.inf, 0
    for epoch in range(max_epochs):
        for group in optimizer.param_groups:
            group["lr"] = LAST_RATE + (FIRST_RATE - LAST_RATE) * (1 + math.cos(math.pi * epoch / max_epochs)) / 2
        total = 0.0
        batches = torch.randperm(len(x), generator=generator).split(BATCH_SIZE)
        for batch in batches:
            loss = reconstruction_errors(x[batch], *weights).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(batch)
        best, waited = (total, 0) if total < best else (best, waited + len(batches))
        if waited >= PATIENCE:
            return epoch + 1
    return max_epochs
