"""Two processes do what one does."""

from __future__ import annotations

import pytest

from support.runs import SAME, assert_ranks_agree

FSDP2 = (
    "training.arguments.fsdp=true",
    "training.arguments.fsdp_config={version: 2, auto_wrap_policy: TRANSFORMER_BASED_WRAP, "
    "transformer_layer_cls_to_wrap: [LlamaDecoderLayer], state_dict_type: FULL_STATE_DICT, "
    "cpu_ram_efficient_loading: false}",
)
ZERO3 = (
    "training.arguments.deepspeed={zero_optimization: {stage: 3, stage3_param_persistence_threshold: 0}, "
    "train_micro_batch_size_per_gpu: auto, gradient_accumulation_steps: auto, gradient_clipping: auto}",
)


@pytest.mark.parametrize(
    ("method", "sharded"),
    [
        pytest.param("smolora", (), id="smolora-ddp"),  # what several GPUs run first
        *(
            pytest.param(method, sharded, id=f"{method}-{name}", marks=pytest.mark.slow)
            for method in ("smolora", "seqlora", "dora")
            for name, sharded in (("ddp", ()), ("fsdp2", FSDP2), ("zero3", ZERO3))
            if (method, name) != ("smolora", "ddp")
        ),
        *(
            pytest.param(method, (), id=f"{method}-ddp", marks=pytest.mark.slow)
            for method in (
                "moelora",
                "branchlora",
                "dmole",
                "lilora",
                "moecl",
                "replay",
                "ewc",
                "ewc-tir",
                "smolora-ridge",
                "smolora-prototype",
                "routed",
            )
        ),
    ],
)
def test_two_ranks_equal_one(world, tmp_path, method, sharded):
    """Without dropout, whose masks differ from process to process: losses, adapters, answers and scores."""
    if sharded == ZERO3:
        pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    overrides = [*SAME, f"method={method}", "training.learning_rate=1e-3", "downstream={}"]
    steps = 9 if method == "replay" else 6  # its second stage has the first one's samples as well
    assert_ranks_agree(world, tmp_path, *overrides, sharded=sharded, steps=steps)
