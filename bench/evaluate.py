"""Samples a second of the evaluator: one question at a time, as the released code does, against batches.

Both answer the same questions with the same model, images decoded from files, and the benchmark refuses to report when
in float32 any answer differs. The model is random and so never ends an answer: `--new-tokens` is its length.

    python bench/evaluate.py                      a small LLaVA in float32 on the CPU
    python bench/evaluate.py --preset llava-7b    LLaVA-1.5-7B's shapes, random weights, bfloat16, on a GPU
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import CLIPImageProcessorPil

from report import environment, results_folder
from small_llava import embed_questions, small_adapter, small_llava, small_tokenizer, write_questions
from smolora.backbones.llava import Llava
from smolora.data.images import ImageTransform
from smolora.data.prompts import PromptEncoder
from smolora.evaluate.generate import AnswerJob, GenerationSettings, generate_answers
from smolora.io.files import write_json


@dataclass(frozen=True)
class Preset:
    hidden: int
    intermediate: int
    layers: int
    heads: int
    vision_hidden: int
    vision_layers: int
    image_size: int
    rank: int
    dtype: torch.dtype
    device: str
    questions: int
    token_budget: int
    side: int  # pixels of a drawn image, at most


PRESETS = {
    "small": Preset(
        hidden=64,
        intermediate=192,
        layers=2,
        heads=4,
        vision_hidden=32,
        vision_layers=2,
        image_size=56,
        rank=4,
        dtype=torch.float32,
        device="cpu",
        questions=48,
        token_budget=2048,
        side=96,
    ),
    "llava-7b": Preset(
        hidden=4096,
        intermediate=11008,
        layers=32,
        heads=32,
        vision_hidden=1024,
        vision_layers=24,
        image_size=336,
        rank=16,
        dtype=torch.bfloat16,
        device="cuda",
        questions=256,
        token_budget=32768,
        side=480,
    ),
}


def build(preset: Preset) -> torch.nn.Module:
    """Make the preset's LLaVA with its adapter, on its device."""
    device = torch.device(preset.device)
    with device:
        model = small_llava(
            hidden=preset.hidden,
            intermediate=preset.intermediate,
            layers=preset.layers,
            heads=preset.heads,
            vision_hidden=preset.vision_hidden,
            vision_layers=preset.vision_layers,
            image_size=preset.image_size,
            dtype=preset.dtype,
        )
    return small_adapter(model, r=preset.rank, lora_alpha=2 * preset.rank, num_vu_experts=4, num_if_experts=4)


def measure(preset: Preset, folder: Path, rounds: int, new_tokens: int) -> dict[str, object]:
    """Time both in turns, take the best of `rounds`, and compare their answers."""
    model = build(preset)
    encoder = PromptEncoder.for_model(small_tokenizer(), model.config)
    size = preset.image_size
    processor = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    backbone = Llava(encoder, ImageTransform(processor))
    questions = write_questions(folder, preset.questions, side=preset.side)
    ways = {
        "one by one": GenerationSettings(max_new_tokens=new_tokens, token_budget=1, image_workers=0),
        "batched": GenerationSettings(max_new_tokens=new_tokens, token_budget=preset.token_budget),
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    answers = {}
    for number in range(rounds + 1):  # the first warms up
        for way, settings in ways.items():
            output = folder / f"{way.replace(' ', '-')}-{number}.jsonl"
            start = time.perf_counter()
            job = AnswerJob("VQAv2", questions, folder, output, "random")
            generate_answers(model, backbone, job, embed=embed_questions, settings=settings)
            if number:
                seconds[way].append(time.perf_counter() - start)
            answers[way] = [json.loads(line)["text"] for line in output.read_text().splitlines()]
    equal = sum(a == b for a, b in zip(*answers.values(), strict=True)) / preset.questions
    if preset.dtype == torch.float32 and equal < 1:
        raise SystemExit(f"batched answers equal those one by one in {equal:.1%} of the questions only: not reported")
    rate = {way: preset.questions / min(times) for way, times in seconds.items()}
    return {
        "questions": preset.questions,
        "new_tokens": new_tokens,
        "token_budget": preset.token_budget,
        "dtype": str(preset.dtype).removeprefix("torch."),
        "seconds": seconds,
        "samples_per_second": rate,
        "speedup": rate["batched"] / rate["one by one"],
        "equal_answers": equal,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--preset", choices=PRESETS, default="small")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds; the fastest counts")
    parser.add_argument("--new-tokens", type=int, default=4, help="tokens of an answer (VQA: a word or two)")
    parser.add_argument("--output", type=Path, help="folder of the results (default: bench/results/<device>)")
    args = parser.parse_args()
    preset = PRESETS[args.preset]
    if preset.device == "cuda" and not torch.cuda.is_available():
        sys.exit(f"--preset {args.preset} needs a GPU")
    with tempfile.TemporaryDirectory() as folder:
        row = measure(preset, Path(folder), args.rounds, args.new_tokens)
    machine = environment(torch.device(preset.device))
    print(f"{machine['device']}, torch {machine['torch']}, {row['dtype']}, {row['questions']} questions")
    for way, rate in row["samples_per_second"].items():
        print(f"{way:<12}{rate:>10.2f} samples/s")
    print(f"batched / one by one: {row['speedup']:.2f}x; equal answers: {row['equal_answers']:.1%}")
    path = results_folder(args.output, machine) / f"evaluate-{args.preset}.json"
    write_json(path, {"machine": machine, "preset": args.preset, **row})
    print(f"row: {path}")


if __name__ == "__main__":
    main()
