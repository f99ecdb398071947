"""PEFT tuners for every mixture of `smolora.MIXTURES`."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, get_args

from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_target_module_exists
from peft.utils import register_peft_method
from peft.utils.peft_types import PeftType
from torch import Tensor, nn

from ..backbones.families import Target, default_targets, no_default
from ..config import MixtureConfig
from ..methods import MIXTURES
from ..methods.base import Mixture
from ..methods.selector import Features, Selector
from ..peft_compat import register_peft_type
from .arguments import check_image_to_sample, token_input
from .block import layer_class
from .context import CONTEXT, RoutingContext
from .features import read_features
from .install import install, install_image_anchor, remove
from .layer import MixtureLayer, place_of
from .linear import MixtureLinear
from .loading import PREFIX, check_names, explain_refused_peft
from .packing import boundaries
from .selection import SELECTORS, SelectorLayer, add_selector

TARGETS = {kind: default_targets(kind) for kind in get_args(Target)}  # by what a method adapts, and type of model


class MixtureModel(BaseTuner):
    """A model with adapters of one method, made by `peft.get_peft_model`.

    The model's forward and `generate` take the keywords that its adapters need:
        instruction_embeds: (B, e), or (e,) for all samples; where several samples are packed in a row, one for each.
        task_ids: int (B,), the task of each sample, or one for all.
        experts, expert_weights: int (B, c) and (B, c), the experts of each sample and their weights.
        image_to_sample: (images,), the sample of each image, needed where `inputs_embeds` stand for `input_ids`.
        prompt_mask: of the forward alone; bool (B, S), True where a token is no answer. Needed in training where there
            are no labels to tell (`route_over="prompt"`).

    Args:
        model: the model to adapt.
        config: a configuration of the method, or such by adapter name.
        adapter_name: of the adapter.
    """

    mixture: Mixture
    tuner_layer_cls: type[MixtureLinear]

    def _pre_injection_hook(self, model: nn.Module, config: MixtureConfig, adapter_name: str) -> None:
        if not config.takes:  # needs no context: it treats every token alike
            return
        whole = getattr(model, "config", None)
        if any(getattr(c, "is_encoder_decoder", False) for c in (whole, getattr(whole, "text_config", None))):
            raise ValueError(
                f"{self.mixture.title} needs a decoder-only language model, got {type(model).__name__}: an encoder and "
                "a decoder have tokens of their own, and the prompt's routes would not reach the answer"
            )
        if CONTEXT not in model.__dict__:
            install(model)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Put an adapter's layers into place, and the selector of its method.

        Raises:
            ValueError: the configuration names a layer that is not adapted.
        """
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        config: MixtureConfig = self.peft_config[adapter_name]
        config.check_layers(self.targeted_module_names)
        _warn_of_experts(model, config, adapted=len(self.targeted_module_names))
        add_selector(model, self.mixture, config, adapter_name)  # not before: PEFT freezes a base without tuner layers
        if self._selectors is not None:
            self._selectors.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _prepare_adapter_config(self, peft_config: MixtureConfig, model_config: dict[str, Any]) -> MixtureConfig:
        """Set the default targets of the model's type.

        Raises:
            ValueError: they are not given, and the type is not known.
        """
        kind = model_config["model_type"]
        if peft_config.target_modules is None and kind not in self.target_module_mapping:
            raise ValueError(no_default("target_modules", kind, self.target_module_mapping))
        return super()._prepare_adapter_config(peft_config, model_config)

    def _create_and_replace(
        self,
        peft_config: MixtureConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **kwargs: Any,
    ) -> None:
        if isinstance(target, self.tuner_layer_cls):
            target.update_layer(adapter_name, peft_config)
            return
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        self.tuner_layer_cls.check_target(base, current_key)
        layer = self.new_layer(target, adapter_name, peft_config, current_key)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """Put the layer in. Its adapter is already on its device, which is not that of an offloaded base."""
        setattr(parent, child_name, new_module)

    def _check_merge_allowed(self) -> None:
        raise ValueError(self.mixture.no_merge)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Refuse an argument that PEFT would drop.

        Raises:
            ValueError: `adapter_names` names an adapter for each sample.
        """
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                "adapter_names must be left out: all samples of a batch go through the active adapters (see "
                f"set_adapter), got {kwargs['adapter_names']!r}"
            )
        yield

    def new_layer(self, target: nn.Module, adapter_name: str, config: MixtureConfig, key: str) -> MixtureLinear:
        """Make the layer that replaces `target`, whose name is `key`."""
        context: RoutingContext | None = self.model.__dict__.get(CONTEXT)
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if context is not None and _takes_sound(self.model, base):
            raise ValueError(
                f"target_modules must not name {key}, which sees sound of any length: nothing tells which sample a "
                "part of it belongs to, nor which parts are padding"
            )
        decoder = _text_decoder(self.model)
        takes_images = context is not None and _takes_images(self.model, base)
        if takes_images and context is not None and decoder is not None:
            install_image_anchor(context, decoder)
        layer = self.tuner_layer_cls(target, adapter_name, config, context=context, key=key, takes_images=takes_images)
        if context is not None:
            context.layers[key] = layer
        return layer

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Cast an adapter to float32, or to the base's dtype if `autocast_adapter_dtype` is False."""
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        if autocast_adapter_dtype:
            return
        for layer in self.model.modules():
            if isinstance(layer, MixtureLayer) and adapter_name in layer.experts:
                _, dtype = place_of(layer)
                if dtype is not None and dtype.is_floating_point:
                    layer.experts[adapter_name].to(dtype)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_name, inference_mode=inference_mode)
        if self._selectors is not None:
            self._selectors.set_adapter(adapter_name, inference_mode=inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        selectors = self._selectors
        if selectors is not None:
            BaseTunerLayer.delete_adapter(selectors, adapter_name)

    def unload(self) -> nn.Module:
        """Return the base model, as it was before it had adapters."""
        context = self.model.__dict__.get(CONTEXT)
        if context is not None:
            remove(context)
        self.model._modules.pop(SELECTORS, None)
        return super().unload()

    # ---- what a forward is not given

    @property
    def _selectors(self) -> SelectorLayer | None:
        found = self.model._modules.get(SELECTORS)
        return found if isinstance(found, SelectorLayer) else None

    def selector(self, adapter_name: str | None = None) -> Selector:
        """Return the selector of an adapter, which finds what a forward or `generate()` is not given.

        Args:
            adapter_name: of the adapter; None: the active one.

        Raises:
            ValueError: there is no such adapter, its method has no selector, or several are active and none is named.
        """
        name = self._one_adapter(adapter_name)
        selector = None if self._selectors is None else self._selectors.find(name)
        if selector is None:
            raise ValueError(f"adapter_name must name an adapter with a selector, got {name!r}")
        return selector

    def sample_features(self, adapter_name: str | None = None, **inputs: Any) -> Features:
        """Return the features of a batch, by which an adapter's selector chooses.

        Args:
            adapter_name: of the adapter; None: the active one.
            inputs: the arguments of a forward: `input_ids`, `pixel_values` and the like, `instruction_embeds` (the
                embeddings of the whole questions), `image_to_sample`.

        Returns:
            image: the pooled output of the vision tower without adapters, normalised, or the mean of its last hidden
                states where it has none. The features of a sample's images are added. None without images.
            text: `instruction_embeds`.

        Raises:
            TypeError, ValueError: an argument does not fit, or there are neither images nor texts.
        """
        tokens = token_input(inputs)
        count = None if tokens is None else tokens.shape[0]
        bounds = None if tokens is None else boundaries(inputs, *tokens.shape[:2])
        count = count if bounds is None else bounds.shape[0] - 1
        owners = check_image_to_sample(inputs.get("image_to_sample"), count)
        name, text = self._one_adapter(adapter_name), inputs.get("instruction_embeds")
        context = self.model.__dict__[CONTEXT]
        return read_features(context, name, inputs, text, count, image_to_sample=owners, bounds=bounds)

    def last_tasks(self) -> Tensor | None:
        """Return the task of each sample of the last forward or `generate()`, int64 (n,), given or chosen.

        A sample has a row for each of its beams. None: no adapter in use needed a task.

        Raises:
            RuntimeError: there was no forward yet.
        """
        context = self.model.__dict__.get(CONTEXT)
        if context is None or context.last is None:
            raise RuntimeError("last_tasks() needs a forward of the model first")
        return context.last.samples.task

    def _one_adapter(self, name: str | None) -> str:
        """Return the name of an adapter, by default of the active one."""
        if name is None:
            if len(self.active_adapters) != 1:
                raise ValueError(f"adapter_name must be given where several are active, {self.active_adapters} are")
            return self.active_adapters[0]
        if name not in self.peft_config:
            raise ValueError(f"adapter_name must be one of the model's, {list(self.peft_config)}, got {name!r}")
        return name

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: MixtureConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        """Return an adapter's tensors from a state dict.

        The state dict that `Trainer` gathers under DeepSpeed's ZeRO-3 lacks frozen parameters, so routers are added.

        Raises:
            KeyError: a router is missing, and ZeRO-3 has left only a part of it in this process.
        """
        tensors = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        for name, parameter in model.named_parameters() if tensors else ():
            whole = getattr(parameter, "ds_numel", None)  # of a parameter that ZeRO-3 partitions
            if whole is None or name in tensors or f".{cls.mixture.name}_experts.{adapter_name}." not in name:
                continue
            if parameter.numel() != whole:
                raise KeyError(
                    f"state_dict has no {name!r}, which is frozen, and ZeRO-3 has left a part of it here: set "
                    f"stage3_param_persistence_threshold of DeepSpeed's zero_optimization to more than {whole}, and "
                    "routers are kept whole"
                )
            tensors[name] = parameter.detach().cpu()
        return tensors

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: MixtureConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return a checkpoint's tensors under the model's names.

        Raises:
            KeyError: see `check_names`.
        """
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        places = {name.removeprefix(PREFIX) for name in model.state_dict()}
        check_names(model, adapter_name, remapped, [n for n in remapped if n.removeprefix(PREFIX) not in places])
        return remapped


def _warn_of_experts(model: nn.Module, config: MixtureConfig, adapted: int) -> None:
    """Warn of experts that the target modules name and that are 3-D parameters: no adapter goes on a parameter."""
    stacks = [name for name, parameter in model.named_parameters() if parameter.dim() == 3 and ".experts." in name]
    named = {name.rpartition(".")[0] for name in stacks if check_target_module_exists(config, name)}
    if named:
        shown = (re.sub(r"\.\d+\.", ".*.", name) for name in stacks if name.rpartition(".")[0] in named)
        warnings.warn(
            f"the experts of {len(named)} layers stay as they are, since each layer has all of its experts in 3-D "
            f"parameters, on which no adapter goes: {', '.join(dict.fromkeys(shown))}. The adapters are on {adapted} "
            "other modules",
            stacklevel=2,
        )


def _text_decoder(model: Any) -> nn.Module | None:
    """Return the language model within a model that takes images; None for a text model."""
    if getattr(getattr(model, "config", None), "vision_config", None) is None:
        return None
    decoder = model.get_decoder()
    return None if decoder is model else decoder


def _takes_images(model: Any, base: nn.Module) -> bool:
    """Return whether a layer's rows are images: it is in a model that takes images, outside of its text decoder."""
    decoder = _text_decoder(model)
    if decoder is None or base is model.get_output_embeddings():
        return False
    return not any(module is base for module in decoder.modules())


def _takes_sound(model: Any, base: nn.Module) -> bool:
    """Return whether a layer is in a model that takes sound and no images, outside of its text decoder."""
    config = getattr(model, "config", None)
    if getattr(config, "audio_config", None) is None or getattr(config, "vision_config", None) is not None:
        return False
    return base is not model.get_output_embeddings() and all(m is not base for m in model.get_decoder().modules())


def register(mixture: Mixture) -> type[MixtureModel]:
    """Register a method with PEFT, once."""
    peft_type = register_peft_type(mixture.name.upper())
    if peft_type not in PEFT_TYPE_TO_TUNER_MAPPING:
        attributes = {
            "__doc__": f"A model with {mixture.title} adapters; see `MixtureModel`.",
            "mixture": mixture,
            "prefix": f"{mixture.name}_",
            "target_module_mapping": TARGETS[mixture.target],
            "tuner_layer_cls": layer_class(mixture),
        }
        model: Any = type(f"{mixture.title}Model", (MixtureModel,), attributes)
        for made in (model, model.tuner_layer_cls):  # pickle looks for an object's class in its module
            made.__module__ = __name__
            globals()[made.__name__] = made
        register_peft_method(name=mixture.name, config_cls=mixture.config, model_cls=model)
    return PEFT_TYPE_TO_TUNER_MAPPING[PeftType[mixture.name.upper()]]


MODELS: dict[str, type[MixtureModel]] = {name: register(mixture) for name, mixture in MIXTURES.items()}
SMoLoRAModel = MODELS["smolora"]
explain_refused_peft()
