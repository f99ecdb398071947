"""MoE-CL (arXiv:2509.18133): a shared and a task's expert on a whole feed-forward block, mixed for each token."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..arguments import is_number
from ..config import TaskConfig
from ..engine.function import mixture_linear
from ..engine.ops import without_autocast
from ..engine.torch_passes import routed_tokens
from ..engine.varlen import cut
from ..spec import Bank, Mixed, Slots, Tokens, accurate_dtype
from .base import Batch, Decision, Mixture, MixtureExperts
from .checks import check_task
from .selector import TaskSelector

PROJECTIONS = ("gate", "up", "down")  # of a block, in which they are named gate_proj and so on; the dropout streams


@dataclass
class MoECLConfig(TaskConfig, method="moecl"):
    """Configuration of MoE-CL.

    Args:
        num_tasks: number of tasks T; there are T + 1 experts, of which expert 0 is shared by all tasks.
        discriminator_weight: w, the weight of the discriminator's loss; 0 leaves the discriminator out.
        double_softmax: whether the discriminator's loss takes the softmax of probabilities, as released, or of logits.
        instruction_dim, image_dim, keys: of the `TaskSelector`, as in `TaskConfig`.
        r, lora_alpha, lora_dropout, target_modules, exclude_modules, modules_to_save: as in `MixtureConfig`, but that
            `target_modules` name feed-forward blocks, with a gate_proj, an up_proj and a down_proj.
    """

    takes: ClassVar[tuple[str, ...]] = ("task", "route_mask")
    route_over: ClassVar[str] = "valid"  # the discriminator sees no padding

    discriminator_weight: float = field(default=1.0, metadata={"help": "weight of the discriminator's loss"})
    double_softmax: bool = field(
        default=True, metadata={"help": "take the softmax twice in the discriminator's loss, as released"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        weight = self.discriminator_weight
        if not is_number(weight) or weight < 0:
            raise ValueError(f"discriminator_weight must be a number of at least 0, got {weight!r}")
        if not isinstance(self.double_softmax, bool):
            raise ValueError(f"double_softmax must be True or False, got {self.double_softmax!r}")


def block_sizes(block: nn.Module) -> tuple[int, int]:
    """Return the hidden and the intermediate size of a feed-forward block, d and m.

    Raises:
        TypeError: `block` has no gate_proj, up_proj, down_proj and act_fn, or their sizes do not fit.
    """
    layers = [getattr(block, f"{name}_proj", None) for name in PROJECTIONS]
    sizes = [(getattr(each, "in_features", None), getattr(each, "out_features", None)) for each in layers]
    d, m = sizes[0]
    if d is None or m is None or sizes != [(d, m), (d, m), (m, d)] or not callable(getattr(block, "act_fn", None)):
        raise TypeError(
            "a feed-forward block must have linear layers gate_proj and up_proj (d to m), down_proj (m to d), and an "
            f"act_fn, got {type(block).__name__} with {dict(zip(PROJECTIONS, sizes, strict=True))}"
        )
    return d, m


class MoECLExperts(MixtureExperts):
    """One MoE-CL adapter on one feed-forward block: h = g_0 F_0(x) + g_1 F_t(x) with g = softmax(G x), t the task.

    F_e is the block with LoRAs of expert e on its three layers,

        u_e = act(W_g x + s B_ge A_ge x) * (W_u x + s B_ue A_ue x),    F_e(x) = W_d u_e + s B_de A_de u_e

    The block's own layers run once for both experts: gate and up on x, down on g_0 u_0 + g_1 u_t, since it is linear.
    A discriminator C guesses the task from the mean of F_0(x) over a sequence's tokens.

    Args:
        in_features, intermediate_features: d and m.
        config: the adapter's configuration.
        device, dtype: of the parameters.

    Parameters (E = T + 1 experts):
        gate_A, up_A (E, r, d) and down_A (E, r, m) Kaiming; gate_B, up_B (E, m, r) and down_B (E, d, r) = 0;
        router (2, d) and discriminator (T, d) ~ N(0, 0.02^2), G and C. The experts of tasks that are not in the batch
        keep their values under any optimiser.
    """

    config: MoECLConfig
    config_class = MoECLConfig
    router: Tensor
    discriminator: Tensor
    sliced = tuple(f"{name}_{letter}" for name in PROJECTIONS for letter in "AB")

    def __init__(
        self,
        in_features: int,
        intermediate_features: int,
        config: MoECLConfig,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.intermediate_features = intermediate_features  # `shapes` needs it
        super().__init__(in_features, in_features, config, device=device, dtype=dtype)
        self._discrimination: tuple[Tensor, Tensor] | None = None  # the last training forward's logits, and tasks

    def shapes(self) -> dict[str, tuple[int, ...]]:
        c, d, m = self.config, self.in_features, self.intermediate_features
        shapes: dict[str, tuple[int, ...]] = {}
        for name, inputs, outputs in (("gate", d, m), ("up", d, m), ("down", m, d)):
            shapes[f"{name}_A"] = (c.num_tasks + 1, c.r, inputs)
            shapes[f"{name}_B"] = (c.num_tasks + 1, outputs, c.r)
        return {**shapes, "router": (2, d), "discriminator": (c.num_tasks, d)}

    def reset_parameter(self, name: str, parameter: Tensor) -> None:
        if name in ("router", "discriminator"):
            nn.init.normal_(parameter, std=0.02)
        elif name.endswith("A"):  # Kaiming with a = sqrt(5), as in nn.Linear and LoRA
            bound = parameter.shape[-1] ** -0.5
            nn.init.uniform_(parameter, -bound, bound)
        else:
            nn.init.zeros_(parameter)

    def trains(self, name: str) -> bool:
        return name != "discriminator" or self.config.discriminator_weight > 0

    def trained_slices(self) -> dict[str, int]:
        """Return two slices of each, the shared expert's and the task's, since tasks train one at a time."""
        return dict.fromkeys(self.sliced, 2)

    def forward(  # type: ignore[override]  # a block is no linear layer, so the engine's call is not the base class's
        self,
        x: Tensor,
        task: int | Tensor,
        *,
        cu_seqlens: Tensor | None = None,
        route_mask: Tensor | None = None,
        base: nn.Module | None = None,
        decision: Decision | None = None,
    ) -> Tensor:
        """Return the adapted block's output.

        Args:
            x: (B, S, d), or packed (T, d) or (1, T, d) with `cu_seqlens`.
            task: an int for all n sequences, or int (n,).
            cu_seqlens: int32 (n + 1,), boundaries of packed sequences.
            route_mask: bool, of x's shape without d: the tokens whose mean the discriminator sees; by default all.
            base: the feed-forward block under the adapter, which has to be given.
            decision: takes what is decided, for callers that may run several forwards at a time.

        Returns:
            h, of x's shape.

        Raises:
            TypeError, ValueError: an argument does not fit; see `MixtureExperts.prepare`.
            RuntimeError: the backend that was asked for cannot run.
        """
        if base is None:
            raise ValueError("base must be the feed-forward block under the experts, which change what is within it")
        block: Any = base
        batch = self.batch(x, cu_seqlens, route_mask)
        n, count = batch.tokens.num_seqs, batch.x.shape[0]
        task = check_task(task, n, self.config.num_tasks, self.router.device)
        if isinstance(task, int):
            task = torch.full((n,), task, device=self.router.device)
        expert = torch.cat([torch.zeros_like(task), task + 1]).int()
        dropout = self._dropout(x.device)

        def low_rank(name: str, rows: Tensor, token_weights: Tensor | None = None) -> Tensor:
            """Return s B A of expert 0 on the first half of the rows, and of expert t on the second: (2, T, k)."""
            A, B = self.get_parameter(f"{name}_A"), self.get_parameter(f"{name}_B")
            return mixture_linear(
                rows,
                [Bank(A, B, stream=PROJECTIONS.index(name))],
                tokens=_twice(batch.tokens, count),
                scaling=self.config.scaling,
                backend=batch.backend,
                slots=Slots(expert.view(-1, 1, 1)),
                token_weights=token_weights,
                dropout=dropout,
            ).y.view(2, count, -1)

        twice = batch.x.repeat(2, 1)
        gate = low_rank("gate", twice) + block.gate_proj(x).view(1, count, -1)
        up = low_rank("up", twice) + block.up_proj(x).view(1, count, -1)
        u = block.act_fn(gate) * up  # (2, T, m)
        accurate = accurate_dtype(batch.x.dtype)
        with without_autocast(x.device.type):
            g = torch.softmax(F.linear(batch.x.to(accurate), self.router.to(accurate)), -1)  # (T, 2)
            g = g.mT.contiguous()
            gated = (g[..., None] * u).sum(0).to(u.dtype)
        down = block.down_proj(gated.view(*x.shape[:-1], -1))
        y = down.view(count, -1) + low_rank("down", u.view(2 * count, -1), g.view(-1, 1)).sum(0)
        if self.training and torch.is_grad_enabled() and self.config.discriminator_weight:
            y = _Attach.apply(y, self._discriminate(u[0], batch, task, block))
        decided = Mixed(y, expert.view(2, n).mT[:, None], None, None, None)
        return self.finish(x, decided, decision)

    def _discriminate(self, u: Tensor, batch: Batch, task: Tensor, block: Any) -> Tensor:
        """Keep and return the discriminator's logits, of the mean of F_0(x) over each sequence's tokens.

        F_0 is linear in u_0 (T, m), so the mean comes first. There is no dropout on the mean: that of a mean over many
        tokens' masks would hardly differ.
        """
        (n, cu_seqlens, mask), count = batch.tokens, u.shape[0]
        accurate = accurate_dtype(u.dtype)
        with without_autocast(u.device.type):
            blocks = cut(count, n, cu_seqlens)
            seen = u.to(accurate) if mask is None else u.to(accurate) * mask[:, None]
            mean = blocks.gather(blocks.split(seen).sum(1))
            mean = mean / routed_tokens(mask, count, n, cu_seqlens, mean)
            A, B = self.get_parameter("down_A")[0].to(accurate), self.get_parameter("down_B")[0].to(accurate)
            low_rank = self.config.scaling * F.linear(F.linear(mean, A), B)
        base = block.down_proj(mean.to(u.dtype)[:, None])[:, 0]
        with without_autocast(u.device.type):
            feature = base.to(accurate) + low_rank
            feature = 2 * feature.detach() - feature  # the same value, and the gradient reversed
            logits = F.linear(feature, self.discriminator.to(accurate))
        if torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1:
            self._discrimination = logits, task  # not when a backward recomputes this: nobody would take them
        return logits

    def discriminator_loss(self) -> Tensor:
        """Return the mean loss of the discriminator over the sequences of the last forward in training mode, once.

        The discriminator's own gradient is that of this loss; what is upstream of it gets the gradient reversed. So
        one optimiser has the discriminator lower the loss, and the shared expert raise it.

        Raises:
            RuntimeError: there was no forward in training mode since the last call.
        """
        if self._discrimination is None:
            raise RuntimeError(
                "discriminator_loss() needs a forward in training mode and with gradients first, for each call "
                "(checkpointed layers need use_reentrant=False)"
            )
        (logits, task), self._discrimination = self._discrimination, None
        if self.config.double_softmax:
            logits = torch.softmax(logits, -1)
        return F.cross_entropy(logits, task.long())

    def facts(self) -> dict[str, Any]:
        return {"intermediate_features": self.intermediate_features, "tasks": self.config.num_tasks}


def _twice(tokens: Tokens, count: int) -> Tokens:
    """Return the tokens of `count` rows that come a second time after the first."""
    bounds = tokens.cu_seqlens
    if bounds is not None:
        bounds = torch.cat([bounds, bounds[1:] + count])
    return Tokens(2 * tokens.num_seqs, bounds)


class _Attach(torch.autograd.Function):
    """y, unchanged, with logits in its graph: DistributedDataParallel looks there for the parameters that are used."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, logits: Tensor) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return dy, None


class FusedMoECL(MoECLExperts):
    """A feed-forward block with a MoE-CL adapter, a drop-in for the block that it wraps.

    The parameters are those of `MoECLExperts`, in float32, or in float64 over a float64 block.

    Args:
        block: the block to adapt, with gate_proj, up_proj, down_proj and act_fn; its parameters are frozen.
        config: the adapter's configuration.

    Attributes:
        base_layer: `block`.

    Raises:
        TypeError: `block` is no such block, or `config` no `MoECLConfig`.
    """

    def __init__(self, block: nn.Module, config: MoECLConfig) -> None:
        if not isinstance(config, MoECLConfig):
            raise TypeError(f"config must be a MoECLConfig, got {type(config).__name__}")
        d, m = block_sizes(block)
        weight: Tensor = block.gate_proj.weight  # type: ignore[assignment, union-attr]
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        super().__init__(d, m, config, device=weight.device, dtype=dtype)
        self.base_layer = block
        self.freeze()

    def freeze(self) -> None:
        """Freeze the block, and a discriminator without weight."""
        super().freeze()
        self.base_layer.requires_grad_(False)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the adapted block's output; arguments and errors are those of `MoECLExperts.forward`."""
        return super().forward(x, *args, base=self.base_layer, **kwargs)


MOECL = Mixture(
    "moecl",
    MoECLConfig,
    MoECLExperts,
    FusedMoECL,
    "MoE-CL cannot be merged into the base: the experts' weights depend on the token",
    target="block",
    selector=TaskSelector.of_adapter,
)
