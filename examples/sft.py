"""Tune a LLaVA with SMoLoRA by TRL's SFTTrainer (pip install trl).

Two things are not in any other recipe: `peft_config` is a `SMoLoRAConfig`, and the collator adds `instruction_embeds`,
the embedding of each sample's instruction, which the adapters route by.

    python examples/sft.py                                # a tiny LLaVA of random weights: seconds on a CPU
    python examples/sft.py --model DIR --output DIR       # a LLaVA of yours
"""

import argparse
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from peft import PeftModel
from tiny import save_tiny_llava, squares
from transformers import LlavaForConditionalGeneration
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

import smolora
from smolora.official.assemble import load_processor


class Collator(DataCollatorForVisionLanguageModeling):
    """TRL's collator, and the embedding of each sample's instruction."""

    encoder: smolora.InstructionEncoder

    def torch_call(self, examples: list[dict]) -> dict[str, torch.Tensor]:
        instructions = [example["instruction"] for example in examples]
        batch = super().torch_call([{k: v for k, v in e.items() if k != "instruction"} for e in examples])
        return {**batch, "instruction_embeds": self.encoder.encode(instructions)}


def conversations(rows: list[dict]) -> Dataset:
    """Rows of image, question, instruction and answer as TRL takes them."""
    return Dataset.from_list(
        [
            {
                "images": [row["image"]],
                "prompt": [{"role": "user", "content": f"{row['question']}\n{row['instruction']}".strip()}],
                "completion": [{"role": "assistant", "content": row["answer"]}],
                "instruction": row["instruction"],
            }
            for row in rows
        ]
    )


def main(arguments: list[str] | None = None) -> list[float]:
    """Train; returns the losses by step."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder of a LLaVA and its processor; a tiny one is made if it is left out")
    parser.add_argument("--output", help="folder of the adapter; a temporary one if it is left out")
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        base = options.model or save_tiny_llava(Path(folder) / "base")
        output = options.output or str(Path(folder) / "adapter")
        processor = load_processor(base)
        collator = Collator(processor, completion_only_loss=True)
        collator.encoder = smolora.InstructionEncoder()
        trainer = SFTTrainer(
            model=LlavaForConditionalGeneration.from_pretrained(base),
            args=SFTConfig(
                output_dir=output,
                max_steps=options.steps,
                per_device_train_batch_size=4,
                learning_rate=1e-2,
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                max_length=None,
                bf16=False,
                remove_unused_columns=False,  # the trainer would drop the instruction
                gradient_checkpointing_kwargs={"use_reentrant": False},
                use_cpu=not torch.cuda.is_available(),
            ),
            train_dataset=conversations(squares(16)),
            data_collator=collator,
            processing_class=processor,
            peft_config=smolora.SMoLoRAConfig(r=8, lora_alpha=16, task_type="CAUSAL_LM"),
        )
        trainer.train()
        trainer.save_model(output)
        for layer, routing in smolora.routing_report(trainer.model).items():
            print(f"{layer}: VU {routing['vu_experts'].tolist()}, IF {routing['if_experts'].tolist()}")
        PeftModel.from_pretrained(LlavaForConditionalGeneration.from_pretrained(base), output)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    main()
