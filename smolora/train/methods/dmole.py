"""D-MoLE (ICML 2025): an expert a task in the layers that need it, and autoencoders that choose the experts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import check_target_module_exists
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from ...io.files import write_json
from ...methods import RoutedLoRAConfig
from ...methods.autoencoder_router import AutoencoderRouter
from ...methods.selector import Features
from ...recipe.schema import SECTION, Count, Number, Text
from ...tuner import MixtureLinear
from ...tuner.features import vision_tower
from ...tuner.model import TARGETS
from ...tuner.placement import place_experts
from .adapter import NEW_PARAMETERS, Adapter, baseline_rank
from .allocation import allocate, expert_budget, gradient_scores
from .stage import Stage, StageWork, drawn, in_eval_mode, without_adapter

Share = Annotated[Number, Field(gt=0, le=1)]


@dataclass(frozen=True, config=SECTION)
class DMoLEOptions:
    """Options of D-MoLE.

    Args:
        target_modules: the layers that are scored and may get experts; None for the linear layers of the attention of
            language model and vision tower.
        budget: share of these layers that get an expert for a task.
        vision_share: share of the experts that the vision tower gets at least.
        scored_share: share of a task's training samples whose gradients score the layers.
        quantile: of a task's own reconstruction errors, which is its threshold: samples above it are not the task's.
        companion_share: share of the votes that an earlier task needs, so that its expert is used beside a new one.
        router_hidden: units of an autoencoder.
        router_epochs: epochs that an autoencoder is trained at most.
        router_samples: training samples of a task that its autoencoder sees at most.
    """

    target_modules: list[Text] | Text | None = None
    budget: Share = 0.5
    vision_share: Share = 0.25
    scored_share: Share = 0.01
    quantile: Share = 0.99
    companion_share: Share = 0.3
    router_hidden: Count = 128
    router_epochs: Count = 1000
    router_samples: Count = 1408


class DMoLE(Adapter):
    """Layers are scored by the pretrained model's gradients; the best ones get an expert for the task.

    Experts of earlier tasks stay as they are. One of them may be used beside the new one, if the task's samples vote
    for it; it then answers the task's questions together with the new one.

    An expert has the rank and alpha of the baselines' LoRA, `baseline.rank` and `baseline.alpha`. A task trains one in
    the share `budget` of the scored layers.
    """

    name = "dmole"
    text = "question"
    only_sequential = True
    refused_add_ons: ClassVar = {
        "replay": "a stage uses its own experts for all of its samples, so older ones would train the wrong experts",
        **NEW_PARAMETERS,
    }
    default_targets = TARGETS["attention"]
    options_class = DMoLEOptions
    options: DMoLEOptions
    _experts: tuple[int, ...]  # that the stage's samples use
    _log: dict[str, Any]  # how they came about

    def config(self, base: nn.Module) -> PeftConfig:
        """The configuration of a new adapter, with an estimate of the first task's experts: all layers score alike.

        Raises:
            ValueError: the model has no vision tower whose output can be told, by which experts are found, or the
                budget leaves language model or vision tower without an expert.
        """
        if vision_tower(base) is None:
            raise ValueError(
                f"method must not be {self.name} for a {type(base).__name__}: its experts are found by the output of a "
                "vision tower, which this model has not or does not show; take smolora or another method"
            )
        rank, alpha = baseline_rank(self.recipe)
        config = RoutedLoRAConfig(
            r=rank,
            lora_alpha=alpha,
            lora_dropout=self.recipe.adapter_config().lora_dropout,
            num_experts=self.recipe.num_task_ids,
            router_hidden=self.options.router_hidden,
            instruction_dim=self.recipe.adapter_config().instruction_dim,
            target_modules=self.targets(base),
            exclude_modules=self.recipe.adapter.get("exclude_modules"),
        )
        layers = [
            name
            for name, module in base.named_modules()
            if isinstance(module, nn.Linear) and check_target_module_exists(config, name)
        ]
        vision = _of_vision(base, layers)
        expert_budget(len(layers) - len(vision), len(vision), self.options.budget, self.options.vision_share)
        chosen = self._allocate(dict.fromkeys(layers, 1.0), vision)
        config.placement = {name: [0] for name in chosen}
        return config

    @property
    def task_source(self) -> Literal["given", "selector"] | None:
        return "selector"

    @property
    def has_task_slots(self) -> bool:
        return True

    @property
    def passes_between_stages(self) -> bool:
        return True

    # ---- a stage

    def freeze(self, model: nn.Module, stage: Stage) -> None:
        """Freeze all experts but the stage's."""
        for layer in _layers(model).values():
            for experts in layer.experts.values():
                if not experts.frozen_experts.is_meta:  # else it has no values: the dry run's first stage
                    others = [expert != stage.number for expert in experts.expert_ids]
                    experts.freeze_experts(torch.tensor(others, device=experts.frozen_experts.device))
                if stage.number not in experts.expert_ids:
                    experts.requires_grad_(False)

    def before_stage(self, model: nn.Module, work: StageWork) -> None:
        """Place the stage's experts, and choose the earlier expert that is used beside them."""
        number, layers = work.stage.number, _layers(model)
        scores = work.once("scores", lambda: self._scores(model, work))
        tuned: Any = model
        chosen = self._allocate(scores, _of_vision(tuned.get_base_model(), layers))
        place_experts(
            model,
            {
                name: [*_placed(layer, but=number), *([number] if name in chosen else [])]
                for name, layer in layers.items()
            },
            generator=torch.Generator().manual_seed(self.recipe.seed + number),
        )
        self.freeze(model, work.stage)
        companion = -1
        if number:
            router = _router(model)
            companion = work.once(
                "companion",
                lambda: router.choose_companion(number, self._features(model, work), self.options.companion_share),
            )
            router.companion[number] = companion
        self._experts = (number,) if companion < 0 else (number, companion)
        self._log = {
            "expert": number,
            "companion": None if companion < 0 else companion,
            "layers": chosen,
            "scores": scores,
        }

    def batch_inputs(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        ids = batch["input_ids"]
        return {"experts": torch.tensor([self._experts], device=ids.device).expand(ids.shape[0], -1)}

    def after_stage(self, model: nn.Module, work: StageWork, folder: Path) -> None:
        """Train the task's autoencoder, and write how the stage's experts came about."""
        router = _router(model)
        epochs = router.fit(
            work.stage.number,
            self._features(model, work),
            quantile=self.options.quantile,
            max_epochs=self.options.router_epochs,
            seed=self.recipe.seed + work.stage.number,
        )
        if work.process.is_main_process:
            threshold = float(router.threshold[work.stage.number])
            write_json(folder / "dmole.json", {**self._log, "threshold": threshold, "router_epochs": epochs})

    def _allocate(self, scores: dict[str, float], vision: list[str]) -> list[str]:
        options = self.options
        return allocate(scores, vision, ratio=options.budget, least_vision=options.vision_share, seed=self.recipe.seed)

    def _scores(self, model: nn.Module, work: StageWork) -> dict[str, float]:
        """The scores of the layers, from samples one by one: neither batch size nor processes change them."""
        count = max(1, round(self.options.scored_share * len(work)))
        one_by_one = replace(work, batch_size=1)
        layers = _layers(model)
        with without_adapter(model):
            scores = gradient_scores(model, layers, one_by_one.batches(self._draw(work, count)))
        total = work.total(scores.to(work.process.device)).tolist()
        return dict(zip(layers, total, strict=True))

    def _features(self, model: nn.Module, work: StageWork) -> Features:
        """The features of the task's samples, gathered from all processes, in their order."""
        chosen = self._draw(work, min(self.options.router_samples, len(work)))
        place, size = work.process, work.batch_size
        tuned: Any = model
        found: list[tuple[int, Features]] = []
        with in_eval_mode(model):
            for round_, batch in enumerate(work.batches(chosen)):
                start = (round_ * place.num_processes + place.process_index) * size
                found.append((start, tuned.base_model.sample_features(**batch)))
        router = _router(model)
        parts = []
        for name, dim in (("image", router.image_dim), ("text", router.text_dim)):
            rows = torch.zeros((len(chosen), dim), device=place.device)
            for start, features in found:
                part = getattr(features, name)
                if part is not None:
                    rows[start : start + len(part)] = part
            parts.append(work.total(rows))
        return Features(*parts)

    def _draw(self, work: StageWork, count: int) -> list[int]:
        """Draw samples of a stage, in their order."""
        return drawn(len(work), count, self.recipe.seed + work.stage.number)


def _layers(model: nn.Module) -> dict[str, MixtureLinear]:
    """The layers that may have experts, by name in the base model."""
    return {m.smolora_key: m for m in model.modules() if isinstance(m, MixtureLinear)}


def _placed(layer: MixtureLinear, but: int) -> list[int]:
    """The experts of a layer, without one of them."""
    return [expert for experts in layer.experts.values() for expert in experts.expert_ids if expert != but]


def _router(model: Any) -> AutoencoderRouter:
    router = model.base_model.selector()
    assert isinstance(router, AutoencoderRouter)  # the configuration has router_hidden
    return router


def _of_vision(base: Any, names: Any) -> list[str]:
    """The layers that are not of the language model."""
    decoder = {id(module) for module in base.get_decoder().modules()}
    modules = dict(base.named_modules())
    return [name for name in names if id(modules[name]) not in decoder]
