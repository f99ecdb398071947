"""Training a whole model: live adapters, recomputation, accumulation, compilation, quantised bases."""

import contextlib
import copy

import pytest
import torch
from peft import get_peft_model, prepare_model_for_kbit_training
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import checkpoint
from transformers import BitsAndBytesConfig, LlavaForConditionalGeneration

import smolora
from smolora.tuner import MixtureLinear
from support.gradients import assert_same_gradients, gradients
from support.tiny_llava import adapted, batch, embeddings, fill_adapters, tiny_config, tiny_llava

ANSWER = {"answer": 3}


def layers_of(model):
    return [m for m in model.modules() if isinstance(m, MixtureLinear)]


# ------------------------------------------------------------------------------------------------------------- adapter


@pytest.mark.parametrize("options", [{}, {"top_k": 2}, {"router_grad": "straight_through"}, {"lora_dropout": 0.25}])
def test_the_adapter_is_live_in_every_layer(options):
    """B learns at the first step, while B = 0 keeps the rest still; after two steps all that was routed to learns."""
    model = get_peft_model(tiny_llava(), tiny_config(**options)).train()
    inputs, e = batch((5, 9, 7), (1, 1, 2), **ANSWER), embeddings(3)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    with torch.no_grad():
        model.eval()
        before = model(**inputs, instruction_embeds=e).logits
        model.train()
    for step in range(3):
        optimizer.zero_grad()
        model(**inputs, instruction_embeds=e).loss.backward()
        report = smolora.routing_report(model)
        for layer in layers_of(model):
            experts, row = layer.smolora_experts["default"], report[layer.smolora_key]
            for name, parameter in experts.named_parameters():
                where = f"{layer.smolora_key}.{name}, step {step}"
                if not parameter.requires_grad:
                    assert name.endswith("router") and parameter.grad is None, where
                    continue
                grad = parameter.grad
                assert grad.isfinite().all(), where
                if step == 0:
                    assert bool(grad.any()) == name.endswith("_B"), where
                if name.endswith(("_A", "_B")):
                    used = set(row[f"{name[:2]}_experts"].flatten().tolist())
                    for expert in range(grad.shape[0]):
                        if expert not in used:
                            assert not grad[expert].any(), f"{where}: expert {expert} got no token"
                        elif step == 2:
                            assert grad[expert].any(), f"{where}: expert {expert}"
                elif step == 2:
                    assert grad.any(), where
        optimizer.step()
    with torch.no_grad():
        model.eval()
        assert not torch.allclose(model(**inputs, instruction_embeds=e).logits, before)


def test_a_batch_without_images_gives_the_projector_zeros():
    """Where another process may have images, each has to give these parameters a gradient."""
    model = adapted().train()
    inputs = batch((5, 9), (0, 0), **ANSWER)
    model(**inputs, instruction_embeds=embeddings(2)).loss.backward()
    projector = [p for n, p in model.named_parameters() if "projector" in n and p.requires_grad]
    assert projector and all(p.grad is not None and not p.grad.any() for p in projector)
    with torch.no_grad():
        model(**inputs, instruction_embeds=embeddings(2))
    got = gradients(model)
    model.zero_grad()
    embeds = model.get_input_embeddings()(inputs.pop("input_ids"))
    model(inputs_embeds=embeds, **inputs, instruction_embeds=embeddings(2)).loss.backward()
    assert_same_gradients(gradients(model), got)


def test_accumulation_is_one_batch():
    model, e = adapted().train(), embeddings(4)
    inputs = batch((5, 9, 4, 12), (1, 0, 2, 1), **ANSWER)
    labelled = 4 * 3
    model(**inputs, instruction_embeds=e, num_items_in_batch=labelled).loss.backward()
    want = gradients(model)
    model.zero_grad()
    start = 0
    for i, images in enumerate((1, 0, 2, 1)):
        keep = inputs["attention_mask"][i].bool()  # uneven: each micro-batch is as wide as its sample
        micro = {name: inputs[name][i : i + 1, keep] for name in ("input_ids", "attention_mask", "labels")}
        if images:
            micro["pixel_values"] = inputs["pixel_values"][start : start + images]
            start += images
        model(**micro, instruction_embeds=e[i : i + 1], num_items_in_batch=labelled).loss.backward()
    assert_same_gradients(gradients(model), want)


# ------------------------------------------------------------------------------------------------------- recomputation


def transformers_checkpointing(reentrant, name="gradient_checkpointing"):
    def enable(model):
        if not hasattr(model, f"{name}_enable"):
            pytest.skip(f"this version of transformers has no {name}_enable")
        getattr(model, f"{name}_enable")(**{f"{name}_kwargs": {"use_reentrant": reentrant}})
        model.enable_input_require_grads()

    return enable


def wrapped_layers(model):
    """As FSDP's activation checkpointing does it."""
    layers = model.get_base_model().model.language_model.layers
    for i, layer in enumerate(layers):
        layers[i] = checkpoint_wrapper(layer)


def by_hand(model):
    """Around the MLPs alone."""
    for layer in model.get_base_model().model.language_model.layers:
        forward = layer.mlp.forward
        layer.mlp.forward = lambda x, forward=forward: checkpoint(forward, x, use_reentrant=False)


RECOMPUTING = {
    "non-reentrant": transformers_checkpointing(False),
    "reentrant": transformers_checkpointing(True),
    "by its newer name": transformers_checkpointing(False, "activation_checkpointing"),
    "reentrant by its newer name": transformers_checkpointing(True, "activation_checkpointing"),
    "wrapped": wrapped_layers,
    "by hand": by_hand,
}


def recomputing(name, **options):
    model = adapted(tiny_config(**options)).train()
    if name is not None:
        RECOMPUTING[name](model)
    return model


def counts_recomputation(model):
    """Starts of an adapted layer's forward; recomputation shows as more of them."""
    calls = []
    layers_of(model)[-1].register_forward_pre_hook(lambda *_: calls.append(1))
    return calls


@pytest.mark.parametrize("how", RECOMPUTING)
@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_recomputation_gives_the_same_gradients(how, dropout):
    inputs, e = batch((5, 9), (2, 1), **ANSWER), embeddings(2)
    found = []
    for name in (None, how):
        model = recomputing(name, lora_dropout=dropout)
        calls = counts_recomputation(model)
        torch.manual_seed(0)
        model(**inputs, instruction_embeds=e, use_cache=False).loss.backward()
        found.append({n.replace("_checkpoint_wrapped_module.", ""): g for n, g in gradients(model).items()})
    assert len(calls) == 2
    assert_same_gradients(found[1], found[0])


@pytest.mark.parametrize("how", ["non-reentrant", "reentrant"])
@pytest.mark.parametrize("images", [(0, 0), (0, 2), (2, 1)])
@pytest.mark.parametrize("embedded", [False, True], ids=["input_ids", "inputs_embeds"])
def test_recomputation_of_any_images(how, images, embedded):
    """Samples without an image, batches without any, several in one; embeddings with an explicit map."""
    found = []
    for name in (None, how):
        model, inputs = recomputing(name), batch((5, 9), images, **ANSWER)
        if embedded:
            inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids"))
            if sum(images):
                inputs["image_to_sample"] = torch.repeat_interleave(torch.arange(2), torch.tensor(images))
        model(**inputs, instruction_embeds=embeddings(2), use_cache=False).loss.backward()
        found.append(gradients(model))
    assert_same_gradients(found[1], found[0])
    assert any("projector" in parameter for parameter in found[0])


ORDERS = {
    "sum": lambda first, second: (first + second).backward(),
    "in order": lambda first, second: (first.backward(), second.backward()),
    "the last one first": lambda first, second: (second.backward(), first.backward()),
}


@pytest.mark.parametrize("how", [None, *RECOMPUTING])
@pytest.mark.parametrize("order", ORDERS)
def test_two_forwards_before_a_backward(how, order):
    """Each backward recomputes with the instruction of its own forward, whatever ran in between."""
    e, other = embeddings(2), embeddings(2, 7)
    inputs, second = batch((5, 9), **ANSWER), batch((3, 4), (1, 2), seed=4, **ANSWER)
    want = {}
    for given, embeds in ((inputs, e), (second, other)):
        model = recomputing(None)
        model(**given, instruction_embeds=embeds).loss.backward()
        for name, grad in gradients(model).items():
            want[name] = want.get(name, 0) + grad
    model = recomputing(how)
    first = model(**inputs, instruction_embeds=e, use_cache=False).loss
    last = model(**second, instruction_embeds=other, use_cache=False).loss
    with torch.no_grad():
        model(**batch((6,), **ANSWER), instruction_embeds=embeddings(1, 9), use_cache=False)
    ORDERS[order](first, last)
    got = {n.replace("_checkpoint_wrapped_module.", ""): g for n, g in gradients(model).items()}
    assert_same_gradients(got, want)


@pytest.mark.parametrize("how", ["non-reentrant", "reentrant"])
def test_a_loss_of_ones_own_on_logits_or_hidden_states(how):
    """The backward finds its call from any output, not only from the model's loss."""
    e, other, inputs = embeddings(2), embeddings(2, 7), batch((5, 9))
    for pick in (lambda out: out.logits, lambda out: out.hidden_states[1]):
        found = []
        for name in (None, how):
            model = recomputing(name)
            prompt = torch.ones_like(inputs["input_ids"], dtype=torch.bool)
            options = {"output_hidden_states": True, "use_cache": False, "prompt_mask": prompt}
            loss = pick(model(**inputs, instruction_embeds=e, **options)).square().mean()
            if name is not None:
                model(**inputs, instruction_embeds=other, use_cache=False, prompt_mask=prompt)
            loss.backward()
            found.append(gradients(model))
        assert_same_gradients(found[1], found[0])


# --------------------------------------------------------------------------------------------------------- compilation


@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_decoder_layers(checkpointing):
    """No graph break, at most two compilations a layer over instructions and lengths, and the same numbers."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    plain, model = adapted().train(), adapted().train()
    layers = model.get_base_model().model.language_model.layers
    for layer in layers:
        layer.compile(backend=counter, fullgraph=not checkpointing)
    if checkpointing:
        transformers_checkpointing(False)(model)
        transformers_checkpointing(False)(plain)
    for step, lengths in enumerate([(5, 9), (5, 9), (7, 3), (4, 11), (12, 6)]):
        inputs, e = batch(lengths, seed=step, **ANSWER), embeddings(2, step)
        for m in (plain, model):
            m.zero_grad()
            m(**inputs, instruction_embeds=e, use_cache=False).loss.backward()
        assert_same_gradients(gradients(model), gradients(plain))
    assert counter.frame_count <= 2 * len(layers)
    torch._dynamo.reset()


@pytest.mark.slow
def test_compiled_whole_model():
    """Graphs break at the model's entry, and the numbers are the same."""
    torch._dynamo.reset()
    model = adapted()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        for step in range(2):
            inputs, e = batch((5, 9), seed=step), embeddings(2, step)
            want = model(**inputs, instruction_embeds=e).logits
            torch.testing.assert_close(compiled(**inputs, instruction_embeds=e).logits, want, rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()


# ----------------------------------------------------------------------------------------------------- quantised bases


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_base(bits, tmp_path):
    """Forward and backward through bitsandbytes layers, which PEFT resolves."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    tiny_llava().save_pretrained(tmp_path)
    options = {4: dict(load_in_4bit=True, bnb_4bit_quant_type="nf4"), 8: dict(load_in_8bit=True)}[bits]
    skip = ["model.vision_tower", "model.multi_modal_projector", "lm_head"]
    quantisation = BitsAndBytesConfig(**options, llm_int8_skip_modules=skip, bnb_4bit_compute_dtype=torch.float32)
    base = LlavaForConditionalGeneration.from_pretrained(
        tmp_path, quantization_config=quantisation, device_map="cpu", dtype=torch.float32
    )
    inputs, e = batch((5, 9), **ANSWER), embeddings(2)
    base.train()  # in eval mode bitsandbytes packs CPU weights for good in a form that has no backward
    with torch.no_grad():
        want = base(**inputs).logits
    base = prepare_model_for_kbit_training(base, gradient_checkpointing_kwargs={"use_reentrant": False})
    model = get_peft_model(base, tiny_config()).train()
    gate = layers_of(model)[-1]
    assert gate.quantization_backend is not None and type(gate.base_layer).__module__.startswith("bitsandbytes")
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs, instruction_embeds=e).logits, want)
    fill_adapters(model)
    model(**inputs, instruction_embeds=e, use_cache=False).loss.backward()
    got = gradients(model)
    assert got.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    # the same weights, dequantised, in plain linear layers
    plain = copy.deepcopy(tiny_llava())
    for name, module in plain.named_modules():
        with contextlib.suppress(AttributeError):
            quantised = model.get_base_model().get_submodule(name)
            if isinstance(module, torch.nn.Linear):
                layer = getattr(quantised, "base_layer", quantised)
                weight = smolora_dequantised(layer, bits)
                module.weight.data.copy_(weight)
    plain = get_peft_model(plain, tiny_config()).train()
    fill_adapters(plain)
    plain.load_state_dict({n: p for n, p in model.state_dict().items() if "smolora" in n}, strict=False)
    plain(**inputs, instruction_embeds=e, use_cache=False).loss.backward()
    assert_same_gradients(
        got, gradients(plain), rtol=1e-4 if bits == 4 else 0.1
    )  # 8 bits: activations are quantised too


def smolora_dequantised(layer, bits):
    from peft.utils import resolve_quantization_backend

    backend = resolve_quantization_backend(layer)
    return layer.weight.data if backend is None else backend.get_base_weight(layer)
