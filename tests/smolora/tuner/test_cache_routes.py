"""A cache keeps its prompt's routes. A decoding loop of the user's own, with a static cache, waits for no device."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, StaticCache

import smolora
from small_llava import small_adapter, small_llava
from smolora.tuner.context import CONTEXT
from support.tiny_llava import INSTRUCTION_DIM, adapted, batch, embeddings, tiny_config

aten = torch.ops.aten
READS = {aten._local_scalar_dense.default, aten.equal.default, aten.nonzero.default}  # wait for a GPU
LENGTH = 32  # of the caches


class Recorder(TorchDispatchMode):
    """The operators of a `with` block, and those of each forward of a model before the model's own begins."""

    def __init__(self, model):
        super().__init__()
        self.ops, self.before = [], []
        base = model.get_base_model()
        base.register_forward_pre_hook(lambda *_: self.ops.clear(), prepend=True)
        base.register_forward_pre_hook(lambda *_: self.before.append(list(self.ops)))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops.append(func)
        return func(*args, **(kwargs or {}))


class Loop:
    """Greedy decoding in static buffers, as for a CUDA graph."""

    def __init__(self, model, device="cpu"):
        self.model = model
        self.cache = StaticCache(config=model.config.text_config, max_cache_len=LENGTH)
        self.ids, self.position = (torch.zeros(2, 1, dtype=torch.long, device=device) for _ in range(2))
        self.mask = torch.ones(2, LENGTH, dtype=torch.long, device=device)

    def start(self, inputs, instruction):
        """The prompt's last logits; puts its best tokens into the buffers."""
        mask = inputs["attention_mask"]
        self.cache.reset()
        self.mask[:, : mask.shape[1]] = mask
        position = (mask.cumsum(1) - 1).clamp(min=0)
        out = self.model(
            **inputs, position_ids=position, instruction_embeds=instruction, past_key_values=self.cache, use_cache=True
        )
        self.position.copy_(position[:, -1:])
        return self.take(out.logits[:, -1])

    def take(self, logits):
        self.ids.copy_(logits.argmax(-1, keepdim=True))
        self.position.add_(1)
        return logits

    def step(self):
        return self.model(
            input_ids=self.ids,
            attention_mask=self.mask,
            position_ids=self.position,
            past_key_values=self.cache,
            use_cache=True,
        ).logits[:, -1]

    def logits(self, inputs, instruction, steps):
        """Of the prompt's last token and of each step, (2, 1 + steps, vocabulary)."""
        first = self.start(inputs, instruction)
        return torch.stack([first, *(self.take(self.step()).clone() for _ in range(steps))], 1)


@pytest.mark.parametrize("decode_routing", ["prompt", "token"])
@torch.no_grad()
def test_a_step_reads_no_value(decode_routing):
    """On a GPU each read would wait for it, and fail a capture: of the cache's length, for one."""
    loop = Loop(adapted(tiny_config(decode_routing=decode_routing)))
    loop.start(batch(), embeddings(2))
    with Recorder(loop.model) as recorder:
        for _ in range(3):
            loop.take(loop.step())
            assert recorder.ops and not READS & set(recorder.ops)
        loop.cache.layers[0].cumulative_length.add_(0)  # somebody may have reset it: now it is read
        loop.step()
        assert READS & set(recorder.ops)


@torch.no_grad()
def test_kept_routes_take_no_work():
    """Neither masks nor placeholders of images are made where nobody reads them."""
    model, inputs = adapted(), batch()
    loop = Loop(model)
    loop.start(inputs, embeddings(2))
    with Recorder(model) as recorder:
        loop.take(loop.step())
        loop.take(loop.step())
    assert recorder.before == [[], []]
    with Recorder(model) as recorder:
        model.generate(**inputs, instruction_embeds=embeddings(2), max_new_tokens=4, min_new_tokens=4)
    first, *later = recorder.before
    assert first and later == [[], [], []]
    loop = Loop(adapted(tiny_config(decode_routing="token")))
    loop.start(inputs, embeddings(2))
    with Recorder(loop.model) as recorder:
        loop.step()
    assert recorder.before[0], "these masks are read: the recorder would have seen others"


@torch.no_grad()
def test_a_reset_cache_starts_anew():
    """With another instruction and prompt as a new cache does; the routes lie where a captured step reads them."""
    model = adapted()
    first, second = (batch((5, 9)), embeddings(2)), (batch((7, 6), seed=3), embeddings(2, 7))
    expected = Loop(model).logits(*second, 4)
    loop, context = Loop(model), getattr(model.get_base_model(), CONTEXT)
    loop.start(*first)
    held = [layer.smolora_experts["default"].last_chosen().routes for layer in context.layers.values()]
    seen = [routes.clone() for routes in held]
    loop.step()
    before = {key: (chosen.routes, chosen.routes.clone()) for key, chosen in context.last.prompt_routes.items()}
    with pytest.raises(ValueError, match="instruction_embeds must be given"):
        loop.start(second[0], None)
    assert torch.equal(loop.logits(*second, 4), expected)
    assert all(context.last.prompt_routes[key].routes is routes for key, (routes, _) in before.items())
    assert any(not torch.equal(routes, copy) for routes, copy in before.values())
    assert all(map(torch.equal, held, seen)), "what was given out of the first prompt has changed"


@torch.inference_mode()
def test_inference_tensors():
    """They count no versions, so their length is read."""
    model, first, second = adapted(), (batch((5, 9)), embeddings(2)), (batch((7, 6), seed=3), embeddings(2, 7))
    loop = Loop(model)
    assert loop.ids.is_inference()
    with torch.no_grad():
        expected = Loop(model).logits(*second, 4)
    loop.logits(*first, 3)
    assert torch.equal(loop.logits(*second, 4), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cuda"])
@torch.no_grad()
def test_a_captured_step(backend):
    """Replayed over several tokens, and for a second prompt: the eager loop's logits, and generate()'s tokens."""
    able = smolora.backend_info()["backends"][backend]
    if not able["available"]:
        pytest.skip(able["reason"])
    torch.use_deterministic_algorithms(False)  # as users run it
    model = small_adapter(small_llava(), instruction_dim=INSTRUCTION_DIM).cuda()
    prompts = [
        ({name: t.cuda() for name, t in batch(lengths, seed=seed).items()}, embeddings(2, seed).cuda())
        for seed, lengths in enumerate([(5, 9), (7, 6)])
    ]
    steps, warm = 10, 3
    with smolora.use_backend(backend):
        eager = [Loop(model, "cuda").logits(*prompt, steps) for prompt in prompts]
        loop = Loop(model, "cuda")
        seen = [loop.start(*prompts[0])]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # what is compiled or made once, by steps that count
            seen += [loop.take(loop.step()) for _ in range(warm)]
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = loop.step()

        def replay():
            graph.replay()
            return loop.take(logits).clone()

        seen += [replay() for _ in range(steps - warm - 1)]
        seen.append(loop.take(loop.step()))  # the eager step goes on where the graph left
        second = [loop.start(*prompts[1]), *(replay() for _ in range(steps))]
        for got, want, (inputs, instruction) in zip((seen, second), eager, prompts, strict=True):
            got = torch.stack(got, 1)
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
            assert torch.equal(got.argmax(-1), want.argmax(-1))
            for options in ({}, {"cache_implementation": "static", "disable_compile": True}):
                tokens = model.generate(
                    **inputs,
                    instruction_embeds=instruction,
                    max_new_tokens=steps + 1,
                    do_sample=False,
                    eos_token_id=None,
                    **options,
                )[:, inputs["input_ids"].shape[1] :]
                assert torch.equal(got.argmax(-1), tokens)
    assert not torch.equal(eager[0].argmax(-1), eager[1].argmax(-1))


def test_return_dict_false_keeps_the_routes_of_its_cache():
    model, e, inputs = adapted(), embeddings(2), batch((5, 9))
    step = {"input_ids": torch.full((2, 1), 7), "use_cache": True}
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
    with torch.no_grad():
        cache = model(**inputs, instruction_embeds=e, use_cache=True).past_key_values
        want = model(**step, attention_mask=mask, past_key_values=cache).logits
        found = model(**inputs, instruction_embeds=e, use_cache=True, return_dict=False)
        cache = next(part for part in found if hasattr(part, "get_seq_length"))
        assert torch.equal(model(**step, attention_mask=mask, past_key_values=cache, return_dict=False)[0], want)


def test_a_cache_by_its_other_name():
    """`cache` in the place of `past_key_values`: it is started, goes on, and is refused where another started it."""
    model, e, inputs = adapted(), embeddings(2), batch((5, 9))
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
    step = {"input_ids": torch.full((2, 1), 7), "attention_mask": mask, "use_cache": True}
    with torch.no_grad():
        started = model(**inputs, instruction_embeds=e, use_cache=True).past_key_values
        want = model(**step, past_key_values=started).logits

        def rename(module, args, kwargs):
            return args, {"past_key_values" if name == "cache" else name: value for name, value in kwargs.items()}

        handle = model.get_base_model().register_forward_pre_hook(rename, with_kwargs=True)
        cache = DynamicCache(config=model.config.text_config)
        model(**inputs, instruction_embeds=e, cache=cache, use_cache=True)
        assert torch.equal(model(**step, cache=cache).logits, want)
        with pytest.raises(RuntimeError, match="no routes to keep"):
            model(**step, instruction_embeds=e, cache=copy.deepcopy(cache))
        handle.remove()
