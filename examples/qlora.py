"""Tune a LLaVA with SMoLoRA over a base in 4 bits (pip install bitsandbytes), in a loop of your own.

python examples/qlora.py                                # a tiny LLaVA of random weights: seconds on a CPU
python examples/qlora.py --model DIR --output DIR       # a LLaVA of yours
"""

import argparse
import tempfile
from pathlib import Path

import torch
from peft import get_peft_model, prepare_model_for_kbit_training
from tiny import save_tiny_llava, squares
from transformers import BitsAndBytesConfig, LlavaForConditionalGeneration, LlavaProcessor

import smolora
from smolora.official.assemble import load_processor


def collate(
    rows: list[dict], processor: LlavaProcessor, encoder: smolora.InstructionEncoder
) -> dict[str, torch.Tensor]:
    """A training batch: the loss is on the answers, and each sample carries the embedding of its instruction."""
    prompts = [
        processor.apply_chat_template(
            [
                {
                    "role": "user",
                    "content": [
                        {"type": "image"},
                        {"type": "text", "text": f"{row['question']}\n{row['instruction']}".strip()},
                    ],
                }
            ],
            add_generation_prompt=True,
        )
        for row in rows
    ]
    answers = [f" {row['answer']}</s>" for row in rows]
    batch = processor(
        images=[row["image"] for row in rows],
        text=[p + a for p, a in zip(prompts, answers, strict=True)],
        return_tensors="pt",
        padding=True,
        padding_side="left",
    )
    labels = torch.full_like(batch["input_ids"], -100)
    for i, answer in enumerate(answers):  # padding is on the left, so the answer is what the row ends with
        length = len(processor.tokenizer(answer, add_special_tokens=False)["input_ids"])
        labels[i, -length:] = batch["input_ids"][i, -length:]
    embeds = encoder.encode([row["instruction"] for row in rows])
    return {**batch, "labels": labels, "instruction_embeds": embeds}


def main(arguments: list[str] | None = None) -> list[float]:
    """Train; returns the losses by step."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder of a LLaVA and its processor; a tiny one is made if it is left out")
    parser.add_argument("--output", help="folder of the adapter; a temporary one if it is left out")
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory() as folder:
        base = options.model or save_tiny_llava(Path(folder) / "base")
        output = options.output or Path(folder) / "adapter"
        quantisation = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.bfloat16,
            llm_int8_skip_modules=["model.vision_tower", "model.multi_modal_projector", "lm_head"],
        )
        model = LlavaForConditionalGeneration.from_pretrained(
            base, quantization_config=quantisation, device_map=device, dtype=torch.bfloat16
        )
        model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
        model = get_peft_model(model, smolora.SMoLoRAConfig(r=8, lora_alpha=16, task_type="CAUSAL_LM")).train()
        model.print_trainable_parameters()
        processor, encoder = load_processor(base), smolora.InstructionEncoder()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        rows, losses = squares(16), []
        for step in range(options.steps):
            batch = collate([rows[(4 * step + i) % len(rows)] for i in range(4)], processor, encoder)
            with torch.autocast(device, dtype=torch.bfloat16):
                loss = model(**{k: v.to(device) for k, v in batch.items()}, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            print(f"step {step + 1}: loss {losses[-1]:.3f}")
        model.save_pretrained(output)
    return losses


if __name__ == "__main__":
    main()
