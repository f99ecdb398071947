"""The golden MiniGPT-4: its parts, its sizes, and the model assembled of them, with a tokenizer of characters."""

from __future__ import annotations

import shutil
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import Blip2Config, Blip2QFormerConfig, Blip2VisionConfig, PreTrainedTokenizerFast

from smolora.official.minigpt4 import assemble_minigpt4

GOLDEN = Path(__file__).parents[2] / "golden"
LANGUAGE, PARTS = GOLDEN / "llava" / "language", GOLDEN / "minigpt4"
VISION, QFORMER, PROJECTOR = PARTS / "eva_vit.pth", PARTS / "blip2_qformer.pth", PARTS / "pretrained_minigpt4.pth"
WORDS = 96  # the golden language model's vocabulary
QUERIES = 5
SIZES = Blip2Config(
    vision_config=Blip2VisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=28,
        patch_size=7,
    ),
    qformer_config=Blip2QFormerConfig(
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=4,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    ),
    num_query_tokens=QUERIES,
)


def assemble_golden(output: Path, **parts: Path) -> dict[str, list[str]]:
    """Assemble the golden parts, or others in their place."""
    parts = {"language": LANGUAGE, "vision": VISION, "qformer": QFORMER, "projector": PROJECTOR, **parts}
    return assemble_minigpt4(**parts, output=output, sizes=SIZES)


def with_tokenizer(folder: Path, more: int = 0) -> Path:
    """Copy the golden language model and give it a tokenizer of characters, with tokens beyond its embeddings."""
    shutil.copytree(LANGUAGE, folder)
    characters = ["<unk>", "<s>", "</s>", "\n", *map(chr, range(32, 124)), *map(str, range(10, 10 + more))]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(characters)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.save_pretrained(folder)
    return folder
