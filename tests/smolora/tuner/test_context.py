"""Routing inputs belong to one call of a model: whatever thread it runs on, and whatever runs within or beside it."""

import copy
import queue
import random
import sys
import threading
from contextlib import contextmanager

import pytest
import torch
from peft import get_peft_model
from torch.utils.checkpoint import checkpoint
from transformers import CompileConfig, LogitsProcessor, StoppingCriteria

import smolora
from smolora import MoELoRAConfig
from smolora.tuner import MixtureLinear
from support.gradients import assert_same_gradients, gradients
from support.tiny_llava import EOS, PAD, adapted, batch, embeddings, fill_adapters, tiny_config, tiny_llama, tiny_llava

GREEDY = {"max_new_tokens": 4, "do_sample": False}


@contextmanager
def threads_take_turns():
    """Python changes threads as often as it can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def in_threads(*jobs):
    """The results of functions that run at a time, each in a thread."""
    results = [None] * len(jobs)

    def work(i):
        try:
            results[i] = jobs[i]()
        except BaseException as error:
            results[i] = error

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(jobs))]
    with threads_take_turns():
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


class Meet:
    """Has the forwards of several threads wait for each other in the middle of a model, so that all are in it."""

    def __init__(self, model, times=1, before_layers=False):
        self.barrier, self.seen, self.times = threading.Barrier(2, timeout=60), threading.local(), times
        decoder = model.get_base_model().model.language_model
        self.handle = (decoder if before_layers else decoder.layers[1]).register_forward_pre_hook(self.wait)

    def wait(self, module, args):
        self.seen.count = getattr(self.seen, "count", 0) + 1
        if threading.current_thread() is not threading.main_thread() and self.seen.count <= self.times:
            self.barrier.wait()


# ------------------------------------------------------------------------------------------------------------- threads


def test_two_threads_in_the_middle_of_a_forward():
    model, inputs = adapted(), [batch((5, 9)), batch((7, 3), (2, 1), seed=3)]
    e = [embeddings(2), embeddings(2, 7)]
    with torch.no_grad():
        alone = [model(**inputs[i], instruction_embeds=e[i]).logits for i in (0, 1)]
    meet = Meet(model)

    def forward(i):
        with torch.no_grad():
            return model(**inputs[i], instruction_embeds=e[i]).logits

    got = in_threads(lambda: forward(0), lambda: forward(1))
    meet.handle.remove()
    assert all(map(torch.equal, got, alone))


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"num_beams": 2}], ids=str)
def test_two_threads_in_the_middle_of_generate(options):
    model, inputs = adapted(), [batch((5, 9)), batch((7, 3), (2, 1), seed=3)]
    e = [embeddings(2), embeddings(2, 7)]
    alone = [model.generate(**inputs[i], instruction_embeds=e[i], **GREEDY, **options) for i in (0, 1)]
    meet = Meet(model, times=2)
    got = in_threads(
        *(lambda i=i: model.generate(**inputs[i], instruction_embeds=e[i], **GREEDY, **options) for i in (0, 1))
    )
    meet.handle.remove()
    assert all(map(torch.equal, got, alone))


def test_a_generate_beside_forwards():
    """As where a streamer's tokens are read while the model answers somebody else."""
    model, inputs, e, other = adapted(), batch((5, 9)), embeddings(2), embeddings(2, 7)
    want = model.generate(**inputs, instruction_embeds=e, **GREEDY)
    with torch.no_grad():
        logits = model(**inputs, instruction_embeds=other).logits
    done = threading.Event()

    def generate():
        try:
            return model.generate(**inputs, instruction_embeds=e, **GREEDY)
        finally:
            done.set()

    def forwards():
        right = []
        while not done.is_set() or not right:
            with torch.no_grad():
                right.append(torch.equal(model(**inputs, instruction_embeds=other).logits, logits))
        return right

    got, right = in_threads(generate, forwards)
    assert torch.equal(got, want) and all(right)


def requests(model, count, seed=0):
    """Forwards and generates, each a function of the model, and what each gives by itself."""
    draw, found = random.Random(seed), []
    kinds = []
    for kind in range(24):
        lengths = [draw.randrange(3, 10) for _ in range(draw.randrange(1, 3))]
        inputs, e = batch(lengths, seed=kind), embeddings(len(lengths), kind)
        if kind % 3 == 0:
            options = [{}, {"use_cache": False}, {"num_beams": 2}][kind // 3 % 3]
            call = lambda inputs=inputs, e=e, options=options: model.generate(  # noqa: E731
                **inputs, instruction_embeds=e, **GREEDY, **options
            )
        else:
            call = lambda inputs=inputs, e=e: model(**inputs, instruction_embeds=e).logits  # noqa: E731
        kinds.append((call, call()))
    for _ in range(count):
        found.append(draw.choice(kinds))
    return found


@pytest.mark.parametrize("count", [64, pytest.param(1000, marks=pytest.mark.slow)])
def test_forwards_and_generates_of_eight_threads(count):
    """All that a demo's users may do at a time: equal to one by one."""
    with torch.no_grad():
        model = adapted()
        todo = queue.SimpleQueue()
        for item in requests(model, count):
            todo.put(item)

        def serve():
            wrong = 0
            with torch.no_grad():  # it is of the thread
                while True:
                    try:
                        call, want = todo.get_nowait()
                    except queue.Empty:
                        return wrong
                    wrong += not torch.equal(call(), want)

        assert in_threads(*[serve] * 8) == [0] * 8


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_two_threads_train(reentrant):
    """Forward, backward and what is recomputed in it, while the other thread is somewhere else."""
    cases = [(batch((5, 9), answer=3), embeddings(2)), (batch((7, 3), (2, 1), seed=3, answer=3), embeddings(2, 7))]

    def model_for():
        model = adapted().train()
        if reentrant is not None:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            model.enable_input_require_grads()
        return model

    def computed(model, case, wait=lambda: None):
        inputs, e = case
        loss = model(**inputs, instruction_embeds=e, use_cache=False).loss
        wait()
        names, parameters = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True)
        if reentrant:  # it has no torch.autograd.grad
            loss.backward()
            return None
        return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))

    want = [computed(model_for(), case) for case in cases]
    model, barrier = model_for(), threading.Barrier(2, timeout=60)
    got = in_threads(*(lambda case=case: computed(model, case, barrier.wait) for case in cases))
    if reentrant:
        one = model_for()
        for case in cases:
            computed(one, case)
        want = [gradients(one)]
        got = [gradients(model)]
    for mine, theirs in zip(got, want, strict=True):
        assert_same_gradients(mine, theirs)


def test_one_backward_over_the_forwards_of_two_threads():
    """The numbers of their nodes are those of two threads: what is recomputed is right or refused."""
    model = adapted().train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    inputs, e = batch((5, 9), answer=3), [embeddings(2), embeddings(2, 7)]
    losses = in_threads(*(lambda x=x: model(**inputs, instruction_embeds=x, use_cache=False).loss for x in e))
    with pytest.raises(RuntimeError, match="nothing tells which of several forwards"):
        sum(losses).backward()


def test_nested_recomputation():
    """A checkpoint within a checkpoint."""
    found = []
    for nested in (False, True):
        model = adapted().train()
        layers = model.get_base_model().model.language_model.layers
        if nested:
            for layer in layers:
                mlp, forward = layer.mlp.forward, layer.forward
                layer.mlp.forward = lambda x, mlp=mlp: checkpoint(mlp, x, use_reentrant=True)
                layer.forward = lambda *args, forward=forward, **kwargs: (
                    checkpoint(forward, *args, use_reentrant=True, **kwargs)
                    if not kwargs
                    else checkpoint(lambda x: forward(x, **kwargs), *args, use_reentrant=True)
                )
            model.enable_input_require_grads()
        model(**batch((5, 9), answer=3), instruction_embeds=embeddings(2), use_cache=False).loss.backward()
        found.append(gradients(model))
    assert_same_gradients(found[1], found[0])


@pytest.mark.parametrize("how", ["non-reentrant", "reentrant"])
@pytest.mark.parametrize("kept", [True, False], ids=["outputs kept", "outputs dropped"])
def test_recomputed_from_what_no_output_is(how, kept):
    """A loss on what a hook took from within; other forwards ran since, and a backward."""
    found = []
    for recompute in (False, True):
        model, taken = adapted().train(), []
        if recompute:
            options = {"use_reentrant": how == "reentrant"}
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
            model.enable_input_require_grads()
        layer = model.get_base_model().model.language_model.layers[1]
        handle = layer.register_forward_hook(lambda m, a, y, taken=taken: taken.append(y))
        out = model(**batch((5, 9), answer=3), instruction_embeds=embeddings(2), use_cache=False)
        handle.remove()
        if not kept:
            del out
        for seed in (7, 8):
            other = model(**batch((4, 6), answer=3), instruction_embeds=embeddings(2, seed), use_cache=False)
        other.loss.backward()
        model.zero_grad()
        taken[0].square().mean().backward()
        found.append(gradients(model))
    assert_same_gradients(found[1], found[0])


def test_compiled_layers_in_two_threads():
    torch._dynamo.reset()
    model, inputs, e = adapted(), batch((5, 9)), [embeddings(2), embeddings(2, 7)]
    with torch.no_grad():
        alone = [model(**inputs, instruction_embeds=x, use_cache=False).logits for x in e]
        for layer in model.get_base_model().model.language_model.layers:
            layer.compile(backend="eager", fullgraph=True)
        model(**inputs, instruction_embeds=e[0], use_cache=False)
    meet = Meet(model, before_layers=True)

    def forward(x):
        with torch.no_grad():
            return model(**inputs, instruction_embeds=x, use_cache=False).logits

    got = in_threads(*(lambda x=x: forward(x) for x in e))
    meet.handle.remove()
    for mine, want in zip(got, alone, strict=True):
        torch.testing.assert_close(mine, want, rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()


def one_backward(losses, middle):
    sum(losses).backward()


def at_a_time(losses, middle):
    in_threads(*(loss.backward for loss in losses))


def one_within_the_other(losses, middle):
    middle.register_hook(lambda _: losses[1].backward())
    losses[0].backward()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("backward", [one_backward, at_a_time, one_within_the_other])
def test_compiled_layers_recompute_their_own_forward(backward, reentrant):
    """Forwards of two threads, whose nodes have the same numbers. Compiled code cannot ask which node recomputes it,
    and one thread runs the nodes of both: of one backward here, of all backward passes on a GPU."""
    torch._dynamo.reset()
    inputs, e, losses, middle, found = batch((5, 9), answer=3), [embeddings(2), embeddings(2, 7)], [], [], []

    def forward(model, x):
        losses.append(model(**inputs, instruction_embeds=x, use_cache=False).loss)

    for compiled in (False, True):
        model = adapted().train()
        layers = model.get_base_model().model.language_model.layers
        if compiled:
            for layer in layers:
                layer.mlp.compile(backend="eager")
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            model.enable_input_require_grads()
            layers[0].register_forward_hook(lambda m, args, y: middle.append(y))
            for x in e:  # one after the other: two threads cannot compile at a time
                thread = threading.Thread(target=forward, args=(model, x))
                thread.start()
                thread.join()
            backward(losses, middle[0])
            with pytest.raises(RuntimeError, match="outside of its model's forward"):
                layers[0].mlp(torch.zeros(1, 2, 32))
        else:
            for x in e:
                forward(model, x)
                losses.pop().backward()
        found.append(gradients(model))
    assert_same_gradients(found[1], found[0])
    torch._dynamo.reset()


def test_the_report_is_of_one_call():
    """Not of layers that two threads ran."""
    model, inputs = adapted(), batch((5, 9))
    e = [embeddings(2), embeddings(2, 7)]
    reports = []
    for x in e:
        with torch.no_grad():
            model(**inputs, instruction_embeds=x)
        reports.append(smolora.routing_report(model))
    meet = Meet(model)
    in_threads(*(lambda x=x: model(**inputs, instruction_embeds=x) for x in e))
    meet.handle.remove()
    got = smolora.routing_report(model)
    same = [
        all(torch.equal(got[name]["if_logits"], report[name]["if_logits"]) for name in report) for report in reports
    ]
    assert sum(same) == 1


# ------------------------------------------------------------------------------------------------------------- replicas


def replicas(module, count):
    """What torch.nn.parallel.replicate makes, on one device."""
    modules = list(module.modules())
    place = {m: i for i, m in enumerate(modules)}
    found = []
    for _ in range(count):
        copies = [m._replicate_for_data_parallel() for m in modules]
        for m, twin in zip(modules, copies, strict=True):
            for key, child in m._modules.items():
                twin._modules[key] = None if child is None else copies[place[child]]
            for key, parameter in m._parameters.items():
                setattr(twin, key, parameter)
            twin._buffers.update(m._buffers)
        found.append(copies[0])
    return found


def test_replicas_are_refused():
    model, e = adapted(), embeddings(2)
    for replica in replicas(model, 2):
        with pytest.raises(RuntimeError, match=r"torch\.nn\.DataParallel.*torchrun"):
            replica(**batch(), instruction_embeds=e)
    with torch.no_grad(), model.disable_adapter():
        want = model(**batch()).logits
        assert torch.equal(replicas(model, 1)[0](**batch()).logits, want)


def test_replicas_of_moelora():
    """Its experts are chosen by the token: replicas share nothing."""
    model = get_peft_model(tiny_llava(), MoELoRAConfig(r=4, num_experts=3)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".B"):
                parameter.normal_()
        inputs = [batch((5, 9)), batch((4, 6), seed=3)]
        want = [model(**x).logits for x in inputs]

    def forward(replica, x):
        with torch.no_grad():
            return replica(**x).logits

    got = in_threads(*(lambda r=r, x=x: forward(r, x) for r, x in zip(replicas(model, 2), inputs, strict=True)))
    assert all(map(torch.equal, got, want))


# -------------------------------------------------------------------------------------------------------------- nested


class Asks(LogitsProcessor):
    """Asks the model within its generate()."""

    def __init__(self, ask):
        self.ask, self.got = ask, []

    def __call__(self, ids, scores):
        self.got.append(self.ask(ids))
        return scores


class Stops(StoppingCriteria):
    def __init__(self, ask):
        self.ask, self.got = ask, []

    def __call__(self, ids, scores, **kwargs):
        self.got.append(self.ask(ids))
        return torch.zeros(ids.shape[0], dtype=torch.bool)


@pytest.mark.parametrize("where", ["processor", "stopping rule"])
@pytest.mark.parametrize("how", ["forward", "generate", "the same tokens", "disabled"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"use_cache": False}], ids=str)
def test_a_call_within_generate(where, how, options):
    model, inputs, e, other = adapted(), batch((6,), seed=2), embeddings(1), embeddings(1, 7) * 3
    within = batch((4, 5), seed=5), torch.cat([other, e])

    @torch.no_grad()
    def ask(ids):
        if how == "forward":
            return model(**within[0], instruction_embeds=within[1]).logits
        if how == "generate":
            return model.generate(**within[0], instruction_embeds=within[1], **GREEDY)
        if how == "the same tokens":
            return model(
                input_ids=ids,
                pixel_values=inputs["pixel_values"].expand(ids.shape[0], -1, -1, -1),
                instruction_embeds=other.expand(ids.shape[0], -1),
            ).logits
        with model.disable_adapter():
            return model.generate(**inputs, **GREEDY), model(**inputs).logits

    alone = model.generate(**inputs, instruction_embeds=e, **GREEDY, **options)
    asks = {"processor": Asks, "stopping rule": Stops}[where](ask)
    given = {"logits_processor": [asks]} if where == "processor" else {"stopping_criteria": [asks]}
    got = model.generate(**inputs, instruction_embeds=e, **given, **GREEDY, **options)
    assert torch.equal(got, alone)
    assert len(asks.got) >= 4
    if how in ("forward", "generate"):
        want = ask(None)
        assert all(torch.equal(mine, want) for mine in asks.got)
    elif how == "disabled":
        assert torch.equal(asks.got[0][0], tiny_llava().generate(**inputs, **GREEDY))
    assert torch.equal(model.generate(**inputs, instruction_embeds=e, **GREEDY, **options), alone)


def test_the_model_itself_as_assistant():
    """It has no instruction then, which is said; with a default one it proposes by that."""
    model, inputs, e = adapted(), batch((6,), seed=2), embeddings(1)
    alone = model.generate(**inputs, instruction_embeds=e, **GREEDY)
    with pytest.raises(ValueError, match="instruction_embeds must be given"):
        model.generate(**inputs, instruction_embeds=e, assistant_model=model, **GREEDY)
    assert torch.equal(model.generate(**inputs, instruction_embeds=e, **GREEDY), alone)
    config = tiny_config(default_instruction=0)
    config.instruction_embeddings = embeddings(1, 7)
    model = get_peft_model(tiny_llama(), config).eval()
    fill_adapters(model)
    ids = {"input_ids": torch.arange(5, 12)[None]}
    want = model.generate(**ids, instruction_embeds=e, **GREEDY)
    assert torch.equal(model.generate(**ids, instruction_embeds=e, assistant_model=model, **GREEDY), want)


@pytest.mark.parametrize("times", [1, 2])
def test_a_forward_within_a_forward(times):
    """From a hook in the middle; one that fails leaves nothing behind."""
    model, inputs, e, other = adapted(), batch((5, 9)), embeddings(2), embeddings(2, 7)
    with torch.no_grad():
        want = model(**inputs, instruction_embeds=e).logits
        inner = model(**inputs, instruction_embeds=other).logits
        depth = []

        def within(module, args):
            if len(depth) < times:
                depth.append(1)
                with pytest.raises(ValueError, match="instruction_embeds must be given"):
                    model(**inputs)
                with pytest.raises(ValueError, match="instruction_embeds must be given"):
                    model.generate(**inputs, **GREEDY)
                assert torch.equal(model(**inputs, instruction_embeds=other).logits, inner)
                depth.pop()
                depth.append(1)

        handle = model.get_base_model().model.language_model.layers[1].register_forward_pre_hook(within)
        assert torch.equal(model(**inputs, instruction_embeds=e).logits, want)
        handle.remove()
        with pytest.raises(RuntimeError, match="outside of its model's forward"):
            model.get_base_model().model.language_model(inputs["input_ids"])


def test_a_backward_within_a_forward():
    """What it recomputes is not the forward's that runs."""
    inputs, e, other = batch((5, 9), answer=3), embeddings(2), embeddings(2, 7)

    def model_for():
        model = adapted().train()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return model

    one = model_for()
    one(**inputs, instruction_embeds=e, use_cache=False).loss.backward()
    want = gradients(one)
    model = model_for()
    loss = model(**inputs, instruction_embeds=e, use_cache=False).loss
    with torch.no_grad():
        logits = model(**inputs, instruction_embeds=other, use_cache=False).logits

        def within(module, args):
            handle.remove()
            loss.backward()

        handle = model.get_base_model().model.language_model.layers[1].register_forward_pre_hook(within)
        assert torch.equal(model(**inputs, instruction_embeds=other, use_cache=False).logits, logits)
    assert_same_gradients(gradients(model), want, rtol=0, atol=0)


def test_copies_of_a_running_model():
    """A copy that is made within a forward starts without a call."""
    model, inputs, e, twins = adapted(), batch((5, 9)), embeddings(2), []
    with torch.no_grad():
        want = model(**inputs, instruction_embeds=e).logits
        layer = model.get_base_model().model.language_model.layers[1]
        handle = layer.register_forward_pre_hook(lambda *_: twins.append(None) or twins.append(copy.deepcopy(model)))
        model(**inputs, instruction_embeds=e)
        handle.remove()
        (twin,) = [t for t in twins if t is not None]
        with pytest.raises(ValueError, match="instruction_embeds must be given"):
            twin(**inputs)
        twin.get_base_model().model.language_model.layers[1]._forward_pre_hooks.clear()
        assert torch.equal(twin(**inputs, instruction_embeds=e).logits, want)


# ------------------------------------------------------------------------------------------------- ways of generating


def test_compiled_generation():
    """A static cache has transformers compile the model's own call."""
    torch._dynamo.reset()
    model, inputs, e = adapted(), batch((5, 9)), embeddings(2)
    want = model.generate(**inputs, instruction_embeds=e, **GREEDY)
    compiling = CompileConfig(backend="eager", fullgraph=False, mode=None)
    compiling._compile_all_devices = True
    got = model.generate(
        **inputs, instruction_embeds=e, cache_implementation="static", compile_config=compiling, **GREEDY
    )
    assert torch.equal(got, want)
    torch._dynamo.reset()


def test_continuous_batching_is_refused():
    """Requests that come and go in one row; the call says so, and not a thread of transformers."""
    config = tiny_config(default_instruction=0)
    config.instruction_embeddings = embeddings(1)
    model = get_peft_model(tiny_llama(), config).eval()
    for call in (
        lambda m: m.generate_batch(inputs=[[5, 6, 7], [8, 9]]),
        lambda m: m.init_continuous_batching(),
    ):
        with pytest.raises(RuntimeError, match=r"must not be used with SMoLoRA adapters.*use generate\(\)"):
            call(model.get_base_model())
    base = model.unload()
    assert not [name for name in ("generate_batch", "forward", "generate") if name in base.__dict__]


def test_names_are_those_of_the_tiny_llama():
    assert (PAD, EOS) == (0, 2) and any(isinstance(m, MixtureLinear) for m in adapted().modules())
