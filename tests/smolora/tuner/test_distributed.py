"""Two processes (gloo, CPU): gradients are those of one process, and nobody waits for an expert without tokens."""

import os
import socket
import traceback

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import smolora
from smolora.methods.smolora import SMoLoRAExperts
from support.gradients import gradients
from support.tiny_llava import adapted, batch, embeddings, tiny_config

LENGTHS, IMAGES = (5, 9, 4, 7), (1, 2, 0, 0)  # the second rank has no image


def half(rank):
    """A rank's half of the batch, or with None all of it; as many answer tokens in each."""
    inputs, e = batch(LENGTHS, IMAGES, answer=3), embeddings(4)
    if rank is None:
        return {**inputs, "instruction_embeds": e}
    rows = slice(2 * rank, 2 * rank + 2)
    out = {name: inputs[name][rows] for name in ("input_ids", "attention_mask", "labels")}
    if rank == 0:
        out["pixel_values"] = inputs["pixel_values"]
    return {**out, "instruction_embeds": e[rows]}


def model_for(mode):
    model = adapted(tiny_config(num_vu_experts=4)).train()
    if "checkpointing" in mode:
        reentrant = {"use_reentrant": False}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=reentrant)
        model.enable_input_require_grads()
    return model


def zero_3(model, rank):
    """The gradients of DeepSpeed ZeRO-3, every parameter partitioned."""
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    for name in deepspeed.ops.__compatible_ops__:  # nothing is compiled: torch has all that is needed
        deepspeed.ops.__compatible_ops__[name] = False
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "optimizer": {"type": "AdamW", "params": {"lr": 0.0, "weight_decay": 0.0, "torch_adam": True}},
        "zero_force_ds_cpu_optimizer": False,
    }
    trainable = [p for p in model.parameters() if p.requires_grad]
    engine, *_ = deepspeed.initialize(model=model, model_parameters=trainable, config=config)
    for _ in range(2):
        engine.backward(engine(**half(rank), use_cache=False).loss)
        got = {name: safe_get_full_grad(p) for name, p in model.named_parameters() if p.requires_grad}
        engine.step()
    return got


def run_mode(mode, rank):
    """The largest error of a gradient, relative to its largest entry; and the experts in use, by layer."""
    reference = model_for(mode)
    reference(**half(None), use_cache=False).loss.backward()
    want = gradients(reference)
    model = model_for(mode)
    if mode.startswith("zero3"):
        return largest_error(zero_3(model, rank), want), None
    if mode.startswith("ddp"):
        forward = DistributedDataParallel(model)
    else:
        mesh = init_device_mesh("cpu", (2,))
        forward = model
        if "experts" in mode:  # as PEFT's policies wrap what trains
            for module in model.modules():
                if isinstance(module, SMoLoRAExperts):
                    fully_shard(module, mesh=mesh)
        if "towers" in mode:
            fully_shard(model.get_base_model().model.multi_modal_projector, mesh=mesh)
            for module in model.modules():
                if type(module).__name__ == "CLIPEncoderLayer":
                    fully_shard(module, mesh=mesh)
        for layer in model.get_base_model().model.language_model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    for _ in range(2):  # a second step finds out whether the first one left something waiting
        model.zero_grad()
        forward(**half(rank), use_cache=False).loss.backward()
    report = smolora.routing_report(model)
    used = [sorted(set(row["vu_experts"].tolist())) for row in report.values()]
    got = gradients(model)
    if not mode.startswith("ddp"):
        got = {name: grad.full_tensor() for name, grad in got.items()}
    return largest_error(got, want), used


def largest_error(got, want):
    assert got.keys() == want.keys(), sorted(got.keys() ^ want.keys())
    return max(float((got[n] - g).abs().max() / g.abs().max()) for n, g in want.items() if g.any())


def worker(rank, port, mode, results):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2")
    os.environ.update(LOCAL_RANK=str(rank), DS_ACCELERATOR="cpu")
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", rank=rank, world_size=2)
        results.put((rank, run_mode(mode, rank)))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        results.put((rank, traceback.format_exc()))
        raise


def in_two_processes(mode):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    context = mp.get_context("fork")  # what is imported need not be imported again
    results = context.Queue()
    workers = [context.Process(target=worker, args=(rank, port, mode, results)) for rank in range(2)]
    for process in workers:
        process.start()
    found = {}
    try:
        for _ in workers:
            rank, result = results.get(timeout=120)
            assert not isinstance(result, str), result
            found[rank] = result
    finally:
        for process in workers:
            process.join(10)
            if process.is_alive():
                process.kill()
    return found


@pytest.mark.parametrize(
    "mode", ["ddp", "ddp checkpointing", "fsdp", "fsdp checkpointing", "fsdp experts", "fsdp towers"]
)
def test_gradients_are_those_of_one_process(mode):
    found = in_two_processes(mode)
    assert max(error for error, _ in found.values()) < 1e-4
    (_, first), (_, second) = found[0], found[1]
    text = [(a, b) for a, b in zip(first[2:], second, strict=True)]
    assert any(a != b for a, b in text), "every expert got tokens on both ranks: the test shows nothing"


@pytest.mark.parametrize("mode", ["zero3", "zero3 checkpointing"])
def test_zero_3(mode):
    pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    found = in_two_processes(mode)
    assert max(error for error, _ in found.values()) < 1e-4
