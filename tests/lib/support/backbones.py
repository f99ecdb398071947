"""Small random models of other architectures than LLaVA-1.5, and left-padded batches for them.

Images are named by (kind, seed): kinds differ in size, where the architecture takes several sizes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import transformers as T
from peft import get_peft_model
from torch import Tensor, nn

from support import tiny_llava
from support.tiny_llava import BOS, IMAGE, PAD, VOCABULARY, fill_adapters, tiny_config

VIDEO, START, END = 4, 5, 6
WORDS = 8  # the first word
FFN = r"(gate_proj|up_proj|down_proj)"
TEXT = {**tiny_llava.TEXT, "num_key_value_heads": 2, "max_position_embeddings": 256, "tie_word_embeddings": False}
TOWER = dict(
    hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
)


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1000 + seed))


@dataclass
class Backbone:
    """An architecture.

    Attributes:
        make: the model without weights that mean anything.
        targets: what to adapt: the text's feed-forward layers, and what joins images to them.
        tokens: the placeholders of an image, by its kind.
        tensors: the other arguments of the model, from the images of each sample.
        needs_image: whether every batch has to have images.
    """

    make: Callable[[], nn.Module]
    targets: str
    tokens: Callable[[int], list[int]] = lambda kind: [IMAGE] * 4
    tensors: Callable[[list[list[tuple[int, int]]]], dict[str, Tensor]] | None = None
    kinds: int = 1
    needs_image: bool = False
    extra: Callable[[dict[str, Tensor]], dict[str, Tensor]] = lambda inputs: {}

    def adapted(self, **options) -> nn.Module:
        """The model with adapters that change its outputs, in eval mode."""
        torch.manual_seed(0)
        model = self.make()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=1.5 * parameter[0].numel() ** -0.5)
            model.get_input_embeddings().weight.normal_()
            model.get_output_embeddings().weight[:WORDS] = 0  # never the best tokens
        for module in model.modules():
            if getattr(module, "generation_config", None) is not None:
                module.generation_config.pad_token_id, module.generation_config.eos_token_id = PAD, None
        model = get_peft_model(model, tiny_config(target_modules=self.targets, **options))
        fill_adapters(model)
        return model.eval()

    def batch(self, rows: list[tuple[int, list[tuple[int, int]]]], answer: int = 0) -> dict[str, Tensor]:
        """A left-padded batch of (words, images); the words are drawn by their number. With `answer`, labels."""
        texts = []
        for words, images in rows:
            generator = torch.Generator().manual_seed(words)
            ids = [BOS, *(token for kind, _ in images for token in self.tokens(kind))]
            texts.append(ids + torch.randint(WORDS, VOCABULARY, (words,), generator=generator).tolist())
        width = max(map(len, texts))

        def padded(values: list[list[int]], fill: int) -> Tensor:
            return torch.tensor([[fill] * (width - len(row)) + row for row in values])

        inputs = {"input_ids": padded(texts, PAD), "attention_mask": padded([[1] * len(row) for row in texts], 0)}
        if answer:
            labels = [[-100] * (len(row) - answer) + row[-answer:] for row in texts]
            inputs["labels"] = padded(labels, -100)
        if self.tensors is not None and any(images for _, images in rows):
            inputs.update(self.tensors([images for _, images in rows]))
        return {**inputs, **self.extra(inputs)}


def flat(rows: list[list[tuple[int, int]]]) -> list[tuple[int, int]]:
    return [image for images in rows for image in images]


def squares(rows: list[list[tuple[int, int]]]) -> dict[str, Tensor]:
    return {"pixel_values": torch.stack([drawn(seed, 3, 28, 28) for _, seed in flat(rows)])}


def sized(sizes: list[tuple[int, int]]) -> Callable[[list[list[tuple[int, int]]]], dict[str, Tensor]]:
    """Images of several sizes, padded to the largest, as Pixtral takes them."""

    def tensors(rows: list[list[tuple[int, int]]]) -> dict[str, Tensor]:
        images = flat(rows)
        pixels = torch.zeros(len(images), 3, *(max(sizes[kind][axis] for kind, _ in images) for axis in (0, 1)))
        for row, (kind, seed) in zip(pixels, images, strict=True):
            height, width = sizes[kind]
            row[:, :height, :width] = drawn(seed, 3, height, width)
        return {"pixel_values": pixels, "image_sizes": torch.tensor([sizes[kind] for kind, _ in images])}

    return tensors


def tiled(sizes: list[tuple[int, int]], tiles: list[int]) -> Callable[[list[list[tuple[int, int]]]], dict[str, Tensor]]:
    """Images cut into tiles, padded to the most, as LLaVA-NeXT takes them."""

    def tensors(rows: list[list[tuple[int, int]]]) -> dict[str, Tensor]:
        images = flat(rows)
        pixels = torch.zeros(len(images), max(tiles[kind] for kind, _ in images), 3, 28, 28)
        for row, (kind, seed) in zip(pixels, images, strict=True):
            row[: tiles[kind]] = drawn(seed, tiles[kind], 3, 28, 28)
        return {"pixel_values": pixels, "image_sizes": torch.tensor([sizes[kind] for kind, _ in images])}

    return tensors


def pixtral(merge: int, config: type, model: type, sizes: list[tuple[int, int]], **options) -> Backbone:
    vision = T.PixtralVisionConfig(**{**TOWER, "image_size": 112})
    return Backbone(
        lambda: model(
            config(vision_config=vision, text_config=T.MistralConfig(**TEXT), image_token_index=IMAGE, **options)
        ),
        rf".*language_model.*\.mlp\.{FFN}|.*multi_modal_projector\.linear_[12]",
        tokens=lambda kind: [IMAGE] * (sizes[kind][0] * sizes[kind][1] // (14 * merge) ** 2),
        tensors=sized(sizes),
        kinds=2,
    )


def grids(patches: list[tuple[int, int]]) -> Callable[[list[list[tuple[int, int]]]], dict[str, Tensor]]:
    """Images as patches, all in one row, as Qwen2.5-VL takes them."""

    def tensors(rows: list[list[tuple[int, int]]]) -> dict[str, Tensor]:
        images = flat(rows)
        pixels = [drawn(seed, patches[kind][0] * patches[kind][1], 3 * 2 * 14**2) for kind, seed in images]
        grid = torch.tensor([(1, *patches[kind]) for kind, _ in images])
        return {"pixel_values": torch.cat(pixels), "image_grid_thw": grid}

    return tensors


def tiles_of(
    config: type, model: type, vision: T.PreTrainedConfig, text: T.PreTrainedConfig, **options: int
) -> Backbone:
    sizes, tiles = [(28, 50), (56, 56)], [3, 5]
    return Backbone(
        lambda: model(
            config(
                vision_config=vision,
                text_config=text,
                image_token_index=IMAGE,
                image_grid_pinpoints=[[28, 56], [56, 28], [56, 56]],
                **options,
            )
        ),
        rf".*language_model.*\.mlp\.{FFN}|.*multi_modal_projector\.linear_[12]",
        tokens=lambda kind: [IMAGE] * (14, 24)[kind],  # 2 x 2 of the whole, and its tiles unpadded with a line's end
        tensors=tiled(sizes, tiles),
        kinds=2,
    )


def qformer(kind: str, text: T.PreTrainedConfig, ffn: str) -> Backbone:
    small = dict(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    vision, query, whole, model = (
        getattr(T, kind + name) for name in ("VisionConfig", "QFormerConfig", "Config", "ForConditionalGeneration")
    )
    ask = {"qformer_input_ids": torch.arange(10, 14)[None]} if kind == "InstructBlip" else {}
    return Backbone(
        lambda: model(
            whole(
                vision_config=vision(**TOWER),
                qformer_config=query(**small),
                text_config=text,
                num_query_tokens=4,
                image_token_index=IMAGE,
            )
        ),
        rf"language_model\..*\.{ffn}|language_projection",
        tensors=squares,
        needs_image=True,
        extra=lambda inputs: {k: v.repeat(len(inputs["input_ids"]), 1) for k, v in ask.items()},
    )


ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
QWEN = dict(
    depth=2,
    hidden_size=32,
    intermediate_size=32,
    num_heads=2,
    patch_size=14,
    out_hidden_size=64,
    window_size=56,
    fullatt_block_indexes=[1],
)
SIGLIP = T.SiglipVisionConfig(**TOWER, vision_use_head=False)
OPT_TEXT = {name: value for name, value in TEXT.items() if name not in ("intermediate_size", "num_key_value_heads")}
OPT = T.OPTConfig(**OPT_TEXT, ffn_dim=64, word_embed_proj_dim=64, dropout=0.0)

BACKBONES = {
    "pixtral": pixtral(
        1,
        T.LlavaConfig,
        T.LlavaForConditionalGeneration,
        [(28, 28), (28, 56)],
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    ),
    "mistral3": pixtral(
        2,
        T.Mistral3Config,
        T.Mistral3ForConditionalGeneration,
        [(56, 56), (56, 112)],
        vision_feature_layer=-1,
        tie_word_embeddings=False,
    ),
    "llava_next": tiles_of(
        T.LlavaNextConfig,
        T.LlavaNextForConditionalGeneration,
        T.CLIPVisionConfig(**TOWER, projection_dim=16),
        T.LlamaConfig(**TEXT),
    ),
    "llava_onevision": tiles_of(
        T.LlavaOnevisionConfig,
        T.LlavaOnevisionForConditionalGeneration,
        SIGLIP,
        T.Qwen2Config(**TEXT),
        video_token_index=VIDEO,
    ),
    "qwen2_5_vl": Backbone(
        lambda: T.Qwen2_5_VLForConditionalGeneration(
            T.Qwen2_5_VLConfig(
                text_config={**TEXT, **ROPE},
                vision_config=QWEN,
                image_token_id=IMAGE,
                video_token_id=VIDEO,
                vision_start_token_id=START,
                vision_end_token_id=END,
            )
        ),
        rf".*language_model.*\.mlp\.{FFN}|.*visual\.merger\.mlp\.[02]",
        tokens=lambda kind: [START, *[IMAGE] * (4, 8)[kind], END],
        tensors=grids([(4, 4), (4, 8)]),
        kinds=2,
        extra=lambda inputs: {"mm_token_type_ids": (inputs["input_ids"] == IMAGE).long()},
    ),
    "internvl": Backbone(
        lambda: T.InternVLForConditionalGeneration(
            T.InternVLConfig(
                vision_config=T.InternVLVisionConfig(**{**TOWER, "image_size": 56}),
                image_token_id=IMAGE,
                text_config=T.Qwen2Config(**TEXT),
                image_seq_length=4,
                tie_word_embeddings=False,
            )
        ),
        rf".*language_model.*\.mlp\.{FFN}|.*multi_modal_projector\.linear_[12]",
        tokens=lambda kind: [START, *[IMAGE] * (4, 8)[kind], END],
        tensors=lambda rows: {"pixel_values": torch.cat([drawn(seed, k + 1, 3, 56, 56) for k, seed in flat(rows)])},
        kinds=2,
    ),
    "blip2_llama": qformer("Blip2", T.LlamaConfig(**TEXT), rf"mlp\.{FFN}"),
    "blip2_opt": qformer("Blip2", OPT, "(fc1|fc2)"),  # whose feed-forward layers see no samples
    "instructblip": qformer("InstructBlip", T.LlamaConfig(**TEXT), rf"mlp\.{FFN}"),
}
TEXT_ONLY = {
    "qwen2_moe": Backbone(  # its shared expert sees no samples
        lambda: T.AutoModelForCausalLM.from_config(
            T.Qwen2MoeConfig(
                **TEXT,
                num_experts=4,
                num_experts_per_tok=2,
                moe_intermediate_size=32,
                shared_expert_intermediate_size=32,
            )
        ),
        rf".*shared_expert\.{FFN}",
    ),
    "phi3": Backbone(lambda: T.Phi3ForCausalLM(T.Phi3Config(**TEXT)), r".*\.mlp\.(gate_up_proj|down_proj)"),
}
