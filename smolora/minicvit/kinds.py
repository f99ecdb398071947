"""The kinds of base model that a benchmark in small can be run on: what each is made of, and how it is spoken to."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    BlipImageProcessorPil,
    CLIPImageProcessorPil,
    GotOcr2ImageProcessorPil,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessorPil,
)

from ..backbones.chat import Chat, without_video
from ..backbones.minigpt4 import MiniGPT4
from ..data.prompts import SYSTEM, PromptEncoder, Sample
from ..instructions.texts import IMAGE_TOKEN
from ..official.llava import llava_config
from ..official.minigpt4 import chat_template
from .pictures import PATCH, Curriculum, Picture, converse, dialogue
from .scenes import SIDE, StableRandom

NUMBER_OR_MARK = r"▁?[01]\.[0-9]{2}|[^\w\s▁]"
GRID = SIDE // PATCH  # patches along a side
MERGED = 2  # patches along a side that Qwen2.5-VL and InternVL make one image token of
TOKENS = (GRID // MERGED) ** 2  # theirs for a picture
HEADS = 4  # of every attention
LONGEST = 512  # tokens of a conversation
QUERIES = 16  # of MiniGPT-4 for a picture
SPECIAL = ("<pad>", "<s>", "</s>", IMAGE_TOKEN, "<unk>")
TURN, END = "<|im_start|>", "<|im_end|>"
TEMPLATE = (
    "{% for message in messages %}" + TURN + "{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}PICTURE{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}" + END + "\n"
    "{% endfor %}{% if add_generation_prompt %}" + TURN + "assistant\n{% endif %}"
)


@dataclass(frozen=True)
class BaseSettings:
    """Hyperparameters of the base model.

    Args:
        backbone: its kind, a name of `KINDS`.
    """

    seed: int = 0
    vision_hidden: int = 128
    vision_layers: int = 3
    hidden: int = 128
    layers: int = 4
    vision_steps: int = 700
    vision_batch: int = 64
    vision_learning_rate: float = 1.5e-3
    steps: int = 350
    batch: int = 32
    learning_rate: float = 2e-3
    pictures: int = 9000
    backbone: str = "llava"

    def vision(self) -> dict[str, Any]:
        """Arguments of the vision tower's configuration, of all kinds but Qwen2.5-VL."""
        return {
            "image_size": SIDE,
            "patch_size": PATCH,
            "hidden_size": self.vision_hidden,
            "intermediate_size": 2 * self.vision_hidden,
            "num_hidden_layers": self.vision_layers,
            "num_attention_heads": HEADS,
        }

    def text(self, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
        """Arguments of the language model's configuration."""
        return {
            "vocab_size": len(tokenizer),
            "hidden_size": self.hidden,
            "intermediate_size": 8 * round(self.hidden * 2.7 / 8),
            "num_hidden_layers": self.layers,
            "num_attention_heads": HEADS,
            "max_position_embeddings": LONGEST,
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        }


class Base(ABC):
    """A base model and how it is spoken to.

    Attributes:
        tokenizer, processor, model: its parts.
        pad_token_id: fills a batch.
    """

    tokenizer: PreTrainedTokenizerFast
    processor: Any
    model: Any
    pad_token_id: int

    @abstractmethod
    def __init__(self, settings: BaseSettings, curriculum: Curriculum) -> None:
        """Make it with random weights in float32."""

    @abstractmethod
    def read(self, image: Image.Image) -> dict[str, Tensor]:
        """Return a picture's arguments of the model's forward."""

    @abstractmethod
    def converse(self, picture: Picture, rng: StableRandom, turns: int) -> Sample:
        """Write a conversation of at most `turns` turns about a picture; only answers have labels."""

    def token_inputs(self, ids: Tensor) -> dict[str, Tensor]:
        """Return the arguments of the forward that follow from the ids."""
        return {}

    @abstractmethod
    def tower(self) -> nn.Module:
        """Return the module that is trained with probes."""

    @abstractmethod
    def patches(self, inputs: dict[str, Tensor]) -> Tensor:
        """Return the tower's patches of n pictures, (n, 16, d), row by row."""

    def freeze_tower(self) -> None:
        """Leave the projector and the language model to train."""
        self.tower().requires_grad_(False)


class LlavaBase(Base):
    """A small LLaVA: a CLIP-like tower, a projector, a Llama."""

    def __init__(self, settings: BaseSettings, curriculum: Curriculum) -> None:
        self.tokenizer = make_tokenizer(curriculum)
        self.model, self.processor = make_model(self.tokenizer, settings), make_processor(self.tokenizer)
        self.encoder = PromptEncoder.for_model(self.tokenizer, self.model.config)
        self.pad_token_id = self.encoder.pad_token_id

    def read(self, image: Image.Image) -> dict[str, Tensor]:
        return {"pixel_values": self.processor.image_processor(images=image, return_tensors="pt")["pixel_values"]}

    def converse(self, picture: Picture, rng: StableRandom, turns: int) -> Sample:
        return Sample(*converse(picture, self.encoder, rng, turns))

    def tower(self) -> nn.Module:
        return self.model.model.vision_tower

    def patches(self, inputs: dict[str, Tensor]) -> Tensor:
        return self.tower()(inputs["pixel_values"], output_hidden_states=True).hidden_states[-1][:, 1:]


class ChatBase(Base):
    """A small model with a chat template."""

    backbone: Chat

    def read(self, image: Image.Image) -> dict[str, Tensor]:
        return self.backbone.process(image).tensors

    def converse(self, picture: Picture, rng: StableRandom, turns: int) -> Sample:
        sample = self.backbone.sample(dialogue(picture, rng, turns))
        places = [[self.backbone.image_token_id] * TOKENS]
        return self.backbone.expand_sample(sample, places)

    def token_inputs(self, ids: Tensor) -> dict[str, Tensor]:
        return self.backbone.token_inputs(ids)

    def finish(self, processor: Any, model: nn.Module) -> None:
        """Set the parts, and how it is spoken to."""
        self.processor, self.model = processor, model
        self.backbone = Chat(processor, [], self.model.config.image_token_id)
        self.pad_token_id = self.backbone.pad_token_id


class QwenBase(ChatBase):
    """A small Qwen2.5-VL. Its merger, which joins pictures to the language model, is trained as the projector is."""

    def __init__(self, settings: BaseSettings, curriculum: Curriculum) -> None:
        picture = "<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|video_pad|>"
        self.tokenizer = make_chat_tokenizer(curriculum, picture, "".join(picture[:3]))
        token = self.tokenizer.convert_tokens_to_ids
        side = PATCH * MERGED
        half = settings.hidden // HEADS // 2
        config = Qwen2_5_VLConfig(
            vision_config={
                "depth": settings.vision_layers,
                "hidden_size": settings.vision_hidden,
                "intermediate_size": 2 * settings.vision_hidden,
                "num_heads": HEADS,
                "patch_size": PATCH,
                "spatial_merge_size": MERGED,
                "out_hidden_size": settings.hidden,
                "window_size": SIDE,
                "fullatt_block_indexes": list(range(settings.vision_layers)),
            },
            text_config={
                **settings.text(self.tokenizer),
                "num_key_value_heads": HEADS,
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 1e4,
                    "mrope_section": [half - 2 * (3 * half // 8), 3 * half // 8, 3 * half // 8],
                },
            },
            image_token_id=token("<|image_pad|>"),
            video_token_id=token("<|video_pad|>"),
            vision_start_token_id=token("<|vision_start|>"),
            vision_end_token_id=token("<|vision_end|>"),
            tie_word_embeddings=False,
        )
        processor = without_video(Qwen2_5_VLProcessor)(
            Qwen2VLImageProcessorPil(
                patch_size=PATCH, merge_size=MERGED, size={"shortest_edge": side * side, "longest_edge": SIDE * SIDE}
            ),
            self.tokenizer,
            chat_template=self.tokenizer.chat_template,
        )
        self.finish(processor, initialised(Qwen2_5_VLForConditionalGeneration, config, settings.seed))

    def tower(self) -> nn.Module:
        return self.model.model.visual

    def patches(self, inputs: dict[str, Tensor]) -> Tensor:
        grid = inputs["image_grid_thw"]
        found = self.tower()(inputs["pixel_values"], grid_thw=grid).last_hidden_state
        side = GRID // MERGED  # patches come token by token
        blocks = found.view(len(grid), side, side, MERGED, MERGED, -1).transpose(2, 3)
        return blocks.reshape(len(grid), GRID * GRID, -1)

    def freeze_tower(self) -> None:
        super().freeze_tower()
        self.model.model.visual.merger.requires_grad_(True)


class InternVLBase(ChatBase):
    """A small InternVL."""

    def __init__(self, settings: BaseSettings, curriculum: Curriculum) -> None:
        names = {
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        }
        self.tokenizer = make_chat_tokenizer(curriculum, tuple(names.values()), "<IMG_CONTEXT>", names)
        config = InternVLConfig(
            vision_config={**settings.vision(), "layer_scale_init_value": 1.0},
            text_config={"model_type": "qwen2", **settings.text(self.tokenizer), "num_key_value_heads": HEADS},
            image_token_id=self.tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
            image_seq_length=TOKENS,
            downsample_ratio=1 / MERGED,
            tie_word_embeddings=False,
        )
        processor = without_video(InternVLProcessor)(
            GotOcr2ImageProcessorPil(size={"height": SIDE, "width": SIDE}),
            self.tokenizer,
            image_seq_length=TOKENS,
            chat_template=self.tokenizer.chat_template,
        )
        self.finish(processor, initialised(InternVLForConditionalGeneration, config, settings.seed))

    def tower(self) -> nn.Module:
        return self.model.model.vision_tower

    def patches(self, inputs: dict[str, Tensor]) -> Tensor:
        return self.tower()(inputs["pixel_values"]).last_hidden_state[:, 1:]


class MiniGPT4Base(Base):
    """A small MiniGPT-4: a ViT, a Q-Former, a projection, a Llama. The Q-Former is trained as the projection is."""

    def __init__(self, settings: BaseSettings, curriculum: Curriculum) -> None:
        self.tokenizer = make_minigpt4_tokenizer(curriculum)
        config = Blip2Config(
            vision_config=settings.vision(),
            qformer_config={
                "hidden_size": settings.hidden,
                "intermediate_size": 2 * settings.hidden,
                "num_hidden_layers": 2,
                "num_attention_heads": HEADS,
                "cross_attention_frequency": 1,
                "hidden_dropout_prob": 0.0,
                "attention_probs_dropout_prob": 0.0,
            },
            text_config={"model_type": "llama", **settings.text(self.tokenizer), "tie_word_embeddings": False},
            num_query_tokens=QUERIES,
            image_token_index=self.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        )
        self.model = initialised(Blip2ForConditionalGeneration, config, settings.seed)
        for drawn in (self.model.query_tokens, *self.model.vision_model.embeddings.parameters(recurse=False)):
            nn.init.normal_(drawn, std=0.5)  # from zeros, all queries would stay the same
        images = BlipImageProcessorPil(size={"height": SIDE, "width": SIDE})
        self.processor = Blip2Processor(images, self.tokenizer, num_query_tokens=None)
        self.backbone = MiniGPT4(self.tokenizer, images, config.image_token_index, QUERIES)
        self.pad_token_id = self.backbone.pad_token_id

    def read(self, image: Image.Image) -> dict[str, Tensor]:
        return self.backbone.process(image).tensors

    def converse(self, picture: Picture, rng: StableRandom, turns: int) -> Sample:
        sample = self.backbone.sample(dialogue(picture, rng, turns))
        return self.backbone.expand_sample(sample, [[self.backbone.image_token_id] * QUERIES])

    def token_inputs(self, ids: Tensor) -> dict[str, Tensor]:
        return {} if (ids == self.backbone.image_token_id).any() else self.backbone.join([])

    def tower(self) -> nn.Module:
        return self.model.vision_model

    def patches(self, inputs: dict[str, Tensor]) -> Tensor:
        return self.tower()(inputs["pixel_values"]).last_hidden_state[:, 1:]


KINDS: dict[str, Callable[[BaseSettings, Curriculum], Base]] = {
    "llava": LlavaBase,
    "qwen2_5_vl": QwenBase,
    "internvl": InternVLBase,
    "minigpt4": MiniGPT4Base,
}


# ---- parts


def make_tokenizer(curriculum: Curriculum) -> PreTrainedTokenizerFast:
    """Make a tokenizer of words and punctuation, each with or without a leading space.

    Vicuna's system sentence is a single token.
    """
    split = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(prepend_scheme="never", split=True),
            _marks(curriculum),
            pre_tokenizers.Split("\n", behavior="isolated"),
        ]
    )
    tokenizer = _word_level(split, curriculum.texts(), SPECIAL, "never")
    tokenizer.add_tokens([AddedToken(SYSTEM, normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": IMAGE_TOKEN},
        padding_side="left",
        model_max_length=LONGEST,
    )


def make_chat_tokenizer(
    curriculum: Curriculum, special: Sequence[str], picture: str, names: dict[str, str] | None = None
) -> PreTrainedTokenizerFast:
    """Make a tokenizer with a chat template. A word is the same token at the start of a line and within one.

    Args:
        curriculum: what the model learns from.
        special: the special tokens of pictures.
        picture: what the template writes for a picture.
        names: the tokenizer's attributes for some of the special tokens.
    """
    texts = ["system\nuser\nassistant\n", *curriculum.texts()]
    marks = ("<pad>", TURN, END, "<unk>", *special)
    return PreTrainedTokenizerFast(
        tokenizer_object=_word_level(_lines_of_words(curriculum), texts, marks, "always"),
        pad_token="<pad>",
        eos_token=END,
        unk_token="<unk>",
        extra_special_tokens=names or {},
        padding_side="left",
        model_max_length=LONGEST,
        chat_template=TEMPLATE.replace("PICTURE", picture),
    )


def make_minigpt4_tokenizer(curriculum: Curriculum) -> PreTrainedTokenizerFast:
    """Make a tokenizer for MiniGPT-4's prompt, whose marks are text. A word is the same token at the start of a piece
    and within one.
    """
    texts = [
        "###Human: <Img>",
        "Human: ",
        "</Img> ###Assistant: ",
        *curriculum.texts(),
    ]  # a second turn has no ### before
    return PreTrainedTokenizerFast(
        tokenizer_object=_word_level(_lines_of_words(curriculum), texts, SPECIAL, "always"),
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": IMAGE_TOKEN},
        padding_side="left",
        model_max_length=LONGEST,
        chat_template=chat_template(QUERIES),
    )


def _lines_of_words(curriculum: Curriculum) -> pre_tokenizers.PreTokenizer:
    """Split a text into words, each with a space before it, and marks."""
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split("\n", behavior="isolated"),
            pre_tokenizers.Metaspace(prepend_scheme="always", split=True),
            _marks(curriculum),
        ]
    )


def _marks(curriculum: Curriculum) -> pre_tokenizers.PreTokenizer:
    if curriculum.numbers:
        return pre_tokenizers.Split(Regex(NUMBER_OR_MARK), behavior="isolated")
    return pre_tokenizers.Punctuation(behavior="isolated")


def _word_level(split: Any, texts: Any, special: Sequence[str], scheme: str) -> Tokenizer:
    """A tokenizer whose vocabulary is every word of some texts."""
    words = sorted({word for text in texts for word, _ in split.pre_tokenize_str(text) if word})
    vocabulary = {
        word: index for index, word in enumerate([*special, *(word for word in words if word not in special)])
    }
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    return tokenizer


def make_model(tokenizer: PreTrainedTokenizerFast, settings: BaseSettings) -> LlavaForConditionalGeneration:
    """Make a randomly initialised LLaVA in float32."""
    config = llava_config(
        vision=settings.vision(),
        text=settings.text(tokenizer),
        image_token=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        feature_layer=-1,
        tie_word_embeddings=False,
    )
    return initialised(LlavaForConditionalGeneration, config, settings.seed)


def initialised(kind: Any, config: Any, seed: int) -> Any:
    """Make a model whose weights are drawn wider than by default, which suits large models."""
    torch.manual_seed(seed)
    model = kind(config)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            residual = name.endswith(("o_proj", "out_proj", "down_proj", "fc2", "projection_layer", "attn.proj"))
            nn.init.normal_(module.weight, std=(0.3 if residual else 0.8) * module.in_features**-0.5)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.1)
    return model


def make_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """Make the tokenizer's and image processor's joint processor, as `AutoProcessor` loads it."""
    images = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
