"""Record which experts the adapters chose while a model answered, and the fusion weights alpha and beta."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

Layers = list[dict[str, Any]]


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
        self._found: dict[tuple[str, str], Any] = {}

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
            if layer.smolora_context.current().is_off:  # features of the base are gathered, to choose experts by
                return
            for adapter in [] if layer.disable_adapters else layer.active_in_layer():
                if (name, adapter) not in self._found:
                    self._found[name, adapter] = layer.smolora_experts[adapter].last_routing()

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

    def samples(self, valid: Tensor, image_rows: list[int]) -> list[Layers]:
        """The routing of each sample of the batch.

        Args:
            valid: (B, S), nonzero except at padding.
            image_rows: the sample of each image.

        Returns:
            For each sample its layers in the model's order: "layer" (with the adapter's name where several are active),
            "vu" and "if" (chosen experts; None for an unused branch), "alpha" and "beta" (means over its tokens, or in
            the projector over its image's patches). A sample without an image has no entry for the projector.
        """
        rows: list[Layers] = [[] for _ in range(valid.shape[0])]
        for name, layer, adapter, label in self._active():
            if (name, adapter) not in self._found:
                continue
            routing = self._found[name, adapter]
            routes = [None if r is None else r.reshape(r.shape[0], -1).tolist() for r in routing.routes]
            owners = image_rows if layer.takes_images else range(valid.shape[0])
            shares = {}
            for share in ("alpha", "beta"):
                of_token = getattr(routing, share).double().reshape(len(owners), -1)
                mask = None if layer.takes_images else valid.to(of_token.device).double()
                mean = of_token.mean(1) if mask is None else (of_token * mask).sum(1) / mask.sum(1)
                shares[share] = mean.tolist()
            for row, sample in enumerate(owners):
                rows[sample].append(
                    {
                        "layer": label,
                        "vu": routes[0] and routes[0][row],
                        "if": routes[1] and routes[1][row],
                        **{share: values[row] for share, values in shares.items()},
                    }
                )
        return rows


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
