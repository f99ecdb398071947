"""MoE-CL on the feed-forward blocks of whole models: what `test_mixtures` does not hold of every method."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import smolora
from support.tiny_llava import batch, tiny_llama, tiny_llava

TASKS = torch.tensor([1, 2])


def adapted(**options) -> nn.Module:
    """A tiny Llava whose adapter has values everywhere, in training mode."""
    model = get_peft_model(tiny_llava(), smolora.MoECLConfig(r=4, lora_dropout=0.0, num_tasks=3, **options))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("_B") or "discriminator" in name:
                parameter.normal_(std=0.3)
    return model.train()


def experts(model: nn.Module) -> list[nn.Module]:
    return [m.experts["default"] for m in model.modules() if isinstance(m, smolora.tuner.MixtureBlock)]


def test_targets_of_a_text_model():
    model = get_peft_model(tiny_llama(), smolora.MoECLConfig(r=4))
    assert model.targeted_module_names == [f"model.layers.{i}.mlp" for i in range(2)]


@pytest.mark.parametrize("double_softmax", [True, False])
def test_the_loss_is_the_mean_over_blocks_of_valid_tokens(double_softmax: bool):
    """Computed anew from what each block is given, without its padding."""
    model, inputs = adapted(discriminator_weight=0.5, double_softmax=double_softmax), batch((5, 9), answer=2)
    seen = {}
    blocks = [m for m in model.modules() if isinstance(m, smolora.tuner.MixtureBlock)]
    handles = [block.register_forward_hook(lambda m, args, y: seen.update({m: args[0].detach()})) for block in blocks]
    model(**inputs, task_ids=TASKS)
    loss = smolora.discriminator_loss(model)
    for handle in handles:
        handle.remove()
    expected = []
    for block in blocks:
        e = block.experts["default"]
        for i in range(2):
            x = seen[block][i, inputs["attention_mask"][i].bool()].double()
            base = tuple(block.base_layer.get_parameter(f"{n}_proj.weight").double() for n in ("gate", "up", "down"))
            loras = tuple((e.get_parameter(f"{n}_A")[0], e.get_parameter(f"{n}_B")[0]) for n in ("gate", "up", "down"))
            feature = smolora.reference.moecl_expert(x, base, loras, scaling=e.config.scaling).mean(0)
            z = e.discriminator.double() @ feature
            z = torch.softmax(z, -1) if double_softmax else z
            expected.append(-torch.log_softmax(z, -1)[TASKS[i]])
    torch.testing.assert_close(loss.double(), 0.5 * torch.stack(expected).mean(), rtol=1e-5, atol=1e-6)
    with pytest.raises(RuntimeError, match="needs a forward in training mode"):
        smolora.discriminator_loss(model)


def test_checkpointed_layers_give_the_same_gradients():
    """And what is recomputed is not kept until the next forward."""
    model, inputs = adapted(), batch((5, 9), answer=2)
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        loss = model(**inputs, task_ids=TASKS).loss
        (loss + smolora.discriminator_loss(model)).backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert all(grad.any() for grad in found[0].values())
    assert all(e._discrimination is None for e in experts(model))


def test_no_discriminator_without_weight():
    model = adapted(discriminator_weight=0.0)
    assert not any(e.discriminator.requires_grad for e in experts(model))
    model(**batch((5, 9)), task_ids=TASKS)
    with pytest.raises(ValueError, match="model must have an active MoE-CL adapter with discriminators"):
        smolora.discriminator_loss(model)
    assert all(e.discriminator.requires_grad for e in experts(adapted()))


def test_packed_samples_equal_padded_ones():
    """Tokens of several tasks in one row, each with its own task."""
    model = get_peft_model(tiny_llama(), smolora.MoECLConfig(r=4, lora_dropout=0.0, num_tasks=3)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("_B"):
                parameter.normal_(std=0.3)
        ids = torch.randint(4, 64, (1, 12))
        positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
        together = model(input_ids=ids, position_ids=positions, task_ids=TASKS, use_cache=False).logits[0]
        for i, part in enumerate((slice(0, 5), slice(5, 12))):
            alone = model(input_ids=ids[:, part], task_ids=TASKS[i : i + 1], use_cache=False).logits[0]
            torch.testing.assert_close(together[part], alone, rtol=1e-4, atol=1e-4)


def test_one_adapter_at_a_time():
    model = adapted().eval()
    model.add_adapter("other", smolora.MoECLConfig(r=2, num_tasks=3))
    with torch.no_grad():
        first = model(**batch((5, 9)), task_ids=TASKS).logits
        model.set_adapter("other")  # new: the base model
        other = model(**batch((5, 9)), task_ids=TASKS).logits
        torch.testing.assert_close(other, tiny_llava()(**batch((5, 9))).logits)
        model.set_adapter("default")
        assert torch.equal(model(**batch((5, 9)), task_ids=TASKS).logits, first)
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="one MoECL adapter can be active at a time"):
        model(**batch((5, 9)), task_ids=TASKS)


def test_over_another_adapter():
    """Layers within the block may have a LoRA of PEFT's; a copy answers the same."""
    lora = get_peft_model(tiny_llava(), LoraConfig(target_modules=r".*language_model.*gate_proj", r=2))
    model = get_peft_model(lora.base_model.model, smolora.MoECLConfig(r=2, num_tasks=3)).eval()
    with torch.no_grad():
        y = model(**batch((5, 9)), task_ids=TASKS).logits
        torch.testing.assert_close(y, tiny_llava()(**batch((5, 9))).logits)
        assert torch.equal(copy.deepcopy(model)(**batch((5, 9)), task_ids=TASKS).logits, y)


@pytest.mark.parametrize("targets", [["gate_proj"], ["self_attn"]])
def test_other_modules_are_refused(targets: list[str]):
    with pytest.raises(TypeError, match=r"target_modules must name feed-forward blocks, but .* layer"):
        get_peft_model(tiny_llama(), smolora.MoECLConfig(target_modules=targets))
