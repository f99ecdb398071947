"""Answers of a LLaVA with a SMoLoRA adapter: a batch of prompts, each routed by its instruction.

python examples/generate.py                                                    # tiny and random: seconds on a CPU
python examples/generate.py --model DIR --adapter DIR --image FILE --prompt "What is it?\nAnswer in one word."
"""

import argparse
import tempfile
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from tiny import SENTENCE, save_tiny_llava, squares
from transformers import LlavaForConditionalGeneration

import smolora
from smolora.data.images import read_image
from smolora.official.assemble import load_processor


def save_random_adapter(base: str | Path, folder: str | Path) -> Path:
    """An adapter of random weights, large enough to change the answers."""
    torch.manual_seed(1)
    model = get_peft_model(LlavaForConditionalGeneration.from_pretrained(base), smolora.SMoLoRAConfig(r=8))
    for name, parameter in model.named_parameters():
        if ".smolora_experts." in name and name.endswith(("_A", "_B")):
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    return Path(folder)


def main(arguments: list[str] | None = None) -> list[str]:
    """Generate; returns the answers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder of a LLaVA and its processor; a tiny one is made if it is left out")
    parser.add_argument("--adapter", help="folder of its adapter; a random one is made if it is left out")
    parser.add_argument("--image", help="picture; with --prompt")
    parser.add_argument("--prompt", help="question and instruction, on lines of their own (\\n); with --image")
    parser.add_argument("--tokens", type=int, default=16, help="at most so many new tokens")
    options = parser.parse_args(arguments)
    if (options.image is None) != (options.prompt is None):
        parser.error("--image and --prompt go together")
    if options.image is not None:
        images, prompts = [read_image(options.image)], [options.prompt.replace("\\n", "\n")]
    else:
        rows = squares(4)
        images = [row["image"] for row in rows]
        prompts = [f"{row['question']}\n{row['instruction']}".strip() for row in rows]
    with tempfile.TemporaryDirectory() as folder:
        base = options.model or save_tiny_llava(Path(folder) / "base")
        adapter = options.adapter or save_random_adapter(base, Path(folder) / "adapter")
        processor = load_processor(base)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = PeftModel.from_pretrained(
            LlavaForConditionalGeneration.from_pretrained(base, dtype="auto", device_map=device), adapter
        )
    texts = [
        processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}],
            add_generation_prompt=True,
        )
        for prompt in prompts
    ]
    inputs = processor(images=images, text=texts, return_tensors="pt", padding=True, padding_side="left")
    inputs = inputs.to(device, dtype=model.dtype)
    encoder = smolora.InstructionEncoder(templates=[SENTENCE])  # instructions of several lines have to be known
    embeds = encoder.encode_prompts(prompts).to(device)
    new = model.generate(**inputs, instruction_embeds=embeds, max_new_tokens=options.tokens, do_sample=False)
    answers = processor.batch_decode(new[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    for prompt, answer in zip(prompts, answers, strict=True):
        print(f"{prompt}\n-> {answer}\n")
    for layer, routing in smolora.routing_report(model).items():
        print(f"{layer}: VU experts {routing['vu_experts'].tolist()}, IF experts {routing['if_experts'].tolist()}")
    return answers


if __name__ == "__main__":
    main()
