"""A LLaVA of random weights and its processor, made in code: what the examples run on where no model is given."""

from pathlib import Path

import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPImageProcessorPil,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from smolora.data.prompts import CHAT_TEMPLATE
from smolora.official.llava import llava_config

IMAGE_SIZE, PATCH = 28, 14
COLOURS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (50, 80, 220), "yellow": (230, 210, 50)}
WORD = "Answer the question using a single word or phrase."
SENTENCE = "What is happening in the presented picture?\nPlease describe it in one complete sentence."


def save_tiny_llava(folder: str | Path) -> Path:
    """Write a Llava of 0.3M parameters and its processor, as `from_pretrained` reads them."""
    texts = [WORD, SENTENCE, "USER: ASSISTANT: What colour is it?", *map(answer_sentence, COLOURS)]
    special = ["<pad>", "<s>", "</s>", "<image>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        padding_side="left",
        extra_special_tokens={"image_token": "<image>"},
    )
    config = llava_config(
        vision={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": IMAGE_SIZE,
            "patch_size": PATCH,
            "projection_dim": 32,
        },
        text={
            "vocab_size": len(fast),
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 256,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        image_token=fast.convert_tokens_to_ids("<image>"),
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config)
    model.generation_config.pad_token_id = 0
    model.save_pretrained(folder)
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}
        ),
        tokenizer=fast,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )
    processor.save_pretrained(folder)
    return Path(folder)


def answer_sentence(colour: str) -> str:
    """The answer where a sentence is asked for."""
    return f"The picture shows a {colour} square."


def squares(count: int) -> list[dict]:
    """Pictures of one colour, with a question, an instruction and the answer that it asks for, in turn."""
    rows = []
    for i in range(count):
        name = list(COLOURS)[i // 2 % len(COLOURS)]
        picture = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), COLOURS[name])
        if i % 2:
            rows.append({"image": picture, "question": "", "instruction": SENTENCE, "answer": answer_sentence(name)})
        else:
            rows.append({"image": picture, "question": "What colour is it?", "instruction": WORD, "answer": name})
    return rows
