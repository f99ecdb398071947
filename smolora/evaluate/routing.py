"""Record which experts the adapters chose while a model answered, and the fusion weights alpha and beta."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..routing import Routing

Layers = list[dict[str, Any]]


class _Recorded(NamedTuple):
    """What an adapter of a layer decided in its first forward, over n rows."""

    routing: Routing
    owners: Tensor | None  # (n,), the sample of each row, -1 of padding; None where row i is sample i
    lengths: Tensor | None  # (n,), of images that are packed in one row; None if all rows have as many tokens


class RoutingRecorder:
    """Records the first forward of a `generate()` call at each adapter layer, inside a `with` block.

    Its routes hold for the whole call (`decode_routing="prompt"`), and do not depend on the batch or on the lengths of
    other answers.

    Args:
        model: a model. Nothing is recorded unless it has SMoLoRA adapters.
    """

    def __init__(self, model: nn.Module) -> None:
        self.layers = {name: module for name, module in model.named_modules() if hasattr(module, "smolora_experts")}
        contexts = (getattr(module, "smolora_context", None) for module in model.modules())
        self._context = next((context for context in contexts if context is not None), None)
        self._found: dict[tuple[str, str], _Recorded] = {}

    def __enter__(self) -> RoutingRecorder:
        self._handles = [layer.register_forward_hook(self._hook(name)) for name, layer in self.layers.items()]
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()

    def start(self) -> None:
        """Clear the records before a `generate()` call."""
        self._found = {}

    def _hook(self, name: str) -> Any:
        def record(layer: Any, args: Any, output: Any) -> None:
            names = [] if layer.disable_adapters else layer.active_in_layer()
            for adapter in (each for each in names if (name, each) not in self._found):
                inputs = layer.smolora_context.current()
                decision = layer.decision(inputs, adapter)
                if decision is not None:  # None where the base's features are gathered, to choose experts by
                    mixed, bounds = decision
                    owners = inputs.images.shown_owners(mixed.ids.shape[0]) if layer.takes_images else None
                    lengths = None if bounds is None else bounds.diff()
                    routing = layer.smolora_experts[adapter].routing(mixed)
                    self._found[name, adapter] = _Recorded(routing, owners, lengths)

        return record

    def _active(self) -> Iterator[tuple[str, Any, str, str]]:
        """Each active adapter of each layer: layer name, layer, adapter name, and a label for both."""
        for name, layer in self.layers.items():
            adapters = layer.active_in_layer()
            for adapter in adapters:
                label = name.removeprefix("base_model.model.")
                yield name, layer, adapter, label if len(adapters) == 1 else f"{label} ({adapter})"

    @property
    def experts(self) -> dict[str, tuple[int, int]]:
        """Numbers of VU and IF experts of each layer's active adapter, by label."""
        configs = {label: layer.smolora_experts[adapter].config for _, layer, adapter, label in self._active()}
        return {label: (config.num_vu_experts, config.num_if_experts) for label, config in configs.items()}

    def tasks(self) -> list[int] | None:
        """The task of each sample of the last `generate()` call, given or found by a selector.

        None where the model's adapters need no task.
        """
        last = None if self._context is None else self._context.last
        return None if last is None or last.samples.task is None else last.samples.task.tolist()

    def samples(self, valid: Tensor) -> list[Layers]:
        """The routing of each sample of the batch.

        Args:
            valid: (B, S), nonzero except at padding.

        Returns:
            For each sample its layers in the model's order: "layer" (with the adapter's name where several are active),
            "vu" and "if" (chosen experts, in a connector those of each image or tile; None for an unused branch),
            "alpha" and "beta" (means over its tokens, or in a connector over its images' patches). A sample without an
            image has no entry for the connector.
        """
        count = valid.shape[0]
        samples: list[Layers] = [[] for _ in range(count)]
        for name, _, adapter, label in self._active():
            if (name, adapter) not in self._found:
                continue
            routing, owners, lengths = self._found[name, adapter]
            routes = [None if r is None else r.reshape(r.shape[0], -1).tolist() for r in routing.routes]
            if owners is None:
                owners, weights = torch.arange(count), valid.flatten().cpu().double()
            else:
                weights = None
            shares = [share for share in (routing.alpha, routing.beta) if share is not None]  # both, of a decision
            means = [_means(share, owners.cpu(), lengths, weights, count) for share in shares]
            rows: dict[int, list[int]] = {}
            for row, sample in enumerate(owners.tolist()):
                if sample >= 0:
                    rows.setdefault(sample, []).append(row)
            for sample, own in rows.items():
                vu, if_ = (experts and [expert for row in own for expert in experts[row]] for experts in routes)
                alpha, beta = (mean[sample] for mean in means)
                samples[sample].append({"layer": label, "vu": vu, "if": if_, "alpha": alpha, "beta": beta})
        return samples


def _means(share: Tensor, owners: Tensor, lengths: Tensor | None, weights: Tensor | None, samples: int) -> list[float]:
    """Average a share (T,) over the tokens of each sample.

    Args:
        share: of each token.
        owners: (n,), the sample of each row, -1 of padding.
        lengths: (n,), the tokens of each row; None if all have as many.
        weights: (T,), 0 at padding; None for all.
        samples: how many there are.
    """
    share = share.flatten().cpu().double()
    repeats = len(share) // len(owners) if lengths is None else lengths.cpu().long()
    owner = owners.repeat_interleave(repeats)
    weights = (owner >= 0).double() if weights is None else weights
    sums = torch.zeros(2, samples, dtype=torch.float64)
    sums.index_add_(1, owner.clamp(min=0), torch.stack([share * weights, weights]))
    return (sums[0] / sums[1]).tolist()


def tally(samples: Iterable[Layers], experts: Mapping[str, tuple[int, int]]) -> Layers:
    """Sum the routing of samples for each layer.

    Args:
        samples: the output of `RoutingRecorder.samples`.
        experts: numbers of VU and IF experts of each layer.

    Returns:
        Layers in the model's order: "layer", "samples" (number of samples), "vu" and "if" (how often each expert was
        chosen; None for an unused branch), "alpha" and "beta" (sums).
    """
    layers: dict[str, dict[str, Any]] = {}
    for entry in (entry for sample in samples for entry in sample):
        layer = layers.setdefault(
            entry["layer"],
            {"layer": entry["layer"], "samples": 0, "vu": None, "if": None, "alpha": 0.0, "beta": 0.0},
        )
        layer["samples"] += 1
        for branch, count in zip(("vu", "if"), experts[entry["layer"]], strict=True):
            if entry[branch] is not None:
                layer[branch] = layer[branch] or [0] * count
                for expert in entry[branch]:
                    layer[branch][expert] += 1
        for share in ("alpha", "beta"):
            layer[share] += entry[share]
    return list(layers.values())


def summary(tallies: Iterable[Layers]) -> Layers:
    """Merge tallies, with alpha and beta averaged over all samples."""
    layers: dict[str, dict[str, Any]] = {}
    for entry in (entry for layers_ in tallies for entry in layers_):
        total = layers.setdefault(entry["layer"], {"layer": entry["layer"]})
        for name in ("samples", "alpha", "beta"):
            total[name] = total.get(name, 0) + entry[name]
        for branch in ("vu", "if"):
            if entry[branch] is None:
                total.setdefault(branch, None)
            else:
                before = total.get(branch) or [0] * len(entry[branch])
                total[branch] = [a + b for a, b in zip(before, entry[branch], strict=True)]
    return [
        {
            "layer": name,
            "samples": total["samples"],
            "vu": total["vu"],
            "if": total["if"],
            "alpha": total["alpha"] / total["samples"],
            "beta": total["beta"] / total["samples"],
        }
        for name, total in layers.items()
    ]
