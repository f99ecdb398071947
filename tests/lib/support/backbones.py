"""Small random models of other architectures than LLaVA-1.5, and left-padded batches for them.

Images are named by (kind, seed): kinds differ in size, where the architecture takes several sizes.
"""

from __future__ import annotations

import importlib
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
        whole_samples: whether every sample has an image, or none.
    """

    make: Callable[[], nn.Module]
    targets: str
    tokens: Callable[[int], list[int]] = lambda kind: [IMAGE] * 4
    tensors: Callable[[list[list[tuple[int, int]]]], dict[str, Tensor]] | None = None
    kinds: int = 1
    needs_image: bool = False
    whole_samples: bool = False
    extra: Callable[[dict[str, Tensor]], dict[str, Tensor]] = lambda inputs: {}

    def adapted(self, **options) -> nn.Module:
        """The model with adapters that change its outputs, in eval mode."""
        torch.manual_seed(0)
        model = self.make()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=1.5 * parameter[0].numel() ** -0.5)
                elif name.endswith(("_gate", ".gate")):  # of Mllama, which would see no image
                    parameter.fill_(1.0)
            model.get_input_embeddings().weight.normal_()
            model.get_output_embeddings().weight[:WORDS] = 0  # never the best tokens
        for module in model.modules():
            if getattr(module, "generation_config", None) is not None:
                module.generation_config.pad_token_id, module.generation_config.eos_token_id = PAD, None
        model = get_peft_model(model, tiny_config(**{"target_modules": self.targets, **options}))
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


def grids(patches: list[tuple[int, int]], size: int) -> Callable[[list[list[tuple[int, int]]]], dict[str, Tensor]]:
    """Images as patches, all in one row, as Qwen2.5-VL takes them."""

    def tensors(rows: list[list[tuple[int, int]]]) -> dict[str, Tensor]:
        images = flat(rows)
        pixels = [drawn(seed, patches[kind][0] * patches[kind][1], size) for kind, seed in images]
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
        tensors=stacked(28),
        needs_image=True,
        extra=lambda inputs: {k: v.repeat(len(inputs["input_ids"]), 1) for k, v in ask.items()},
    )


def seen_by_layers(rows: list[list[tuple[int, int]]]) -> dict[str, Tensor]:
    """Images of one or two tiles, padded to two, and samples padded to the most images, as Mllama takes them."""
    most = max(map(len, rows))
    pixels, mask = torch.zeros(len(rows), most, 2, 3, 28, 28), torch.zeros(len(rows), most, 2, dtype=torch.long)
    ratios = torch.zeros(len(rows), most, dtype=torch.long)
    for sample, images in enumerate(rows):
        for place, (kind, seed) in enumerate(images):
            pixels[sample, place, : kind + 1] = drawn(seed, kind + 1, 3, 28, 28)
            mask[sample, place, : kind + 1], ratios[sample, place] = 1, kind + 1
    return {"pixel_values": pixels, "aspect_ratio_mask": mask, "aspect_ratio_ids": ratios}


def padded_images(rows: list[list[tuple[int, int]]]) -> dict[str, Tensor]:
    """Images of one or two tiles, and samples padded to the most tiles, as Idefics3 takes them."""
    tiles = [sum(kind + 1 for kind, _ in images) for images in rows]
    pixels = torch.zeros(len(rows), max(tiles), 3, 56, 56)
    for row, images, count in zip(pixels, rows, tiles, strict=True):
        if images:
            row[:count] = torch.cat([drawn(seed, kind + 1, 3, 56, 56) for kind, seed in images])
    mask = torch.zeros(len(rows), max(tiles), 56, 56, dtype=torch.bool)
    for row, count in zip(mask, tiles, strict=True):
        row[:count] = True
    return {"pixel_values": pixels, "pixel_attention_mask": mask}


def stacked(side: int, tiles: bool = False) -> Callable[[list[list[tuple[int, int]]]], dict[str, Tensor]]:
    """Square images, of one or two tiles each with `tiles`, one after another."""

    def tensors(rows: list[list[tuple[int, int]]]) -> dict[str, Tensor]:
        counts = [(kind + 1 if tiles else 1, seed) for kind, seed in flat(rows)]
        return {"pixel_values": torch.cat([drawn(seed, count, 3, side, side) for count, seed in counts])}

    return tensors


def rope(**options) -> dict:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3], **options}}


def qwen(kind: str, text: dict, vision: dict, connector: str, ffn: str = FFN, patch: int = 14, **tokens) -> Backbone:
    """Qwen's and GLM's models, whose images are patches in one row."""
    config, model = getattr(T, f"{kind}Config"), getattr(T, f"{kind}ForConditionalGeneration")
    ids = {"vision_start_token_id": START, "vision_end_token_id": END, "video_token_id": VIDEO}
    return Backbone(
        lambda: model(
            config(
                text_config={**TEXT, **text},
                vision_config={**GRID_TOWER, **vision, "patch_size": patch},
                image_token_id=IMAGE,
                **{**ids, **tokens},
            )
        ),
        rf".*language_model.*\.mlp\.{ffn}|.*visual\.{connector}",
        tokens=lambda kind: [START, *[IMAGE] * (4, 8)[kind], END],
        tensors=grids([(4, 4), (4, 8)], 3 * 2 * patch**2),
        kinds=2,
        extra=lambda inputs: {"mm_token_type_ids": (inputs["input_ids"] == IMAGE).long()},
    )


def idefics(kind: str) -> Backbone:
    module = importlib.import_module(f"transformers.models.{kind.lower()}.configuration_{kind.lower()}")
    vision = getattr(module, f"{kind}VisionConfig")(**{**TOWER, "image_size": 56})
    return Backbone(
        lambda: getattr(T, f"{kind}ForConditionalGeneration")(
            getattr(T, f"{kind}Config")(
                vision_config=vision,
                text_config=T.LlamaConfig(**TEXT),
                image_token_id=IMAGE,
                scale_factor=2,
                tie_word_embeddings=False,
            )
        ),
        rf".*text_model.*\.mlp\.{FFN}|.*connector\.modality_projection\.proj",
        tokens=lambda kind: [START, *[IMAGE] * 4] * (kind + 1) + [END],
        tensors=padded_images,
        kinds=2,
    )


def llava_like(config: type, model: type, vision: T.PreTrainedConfig, text: T.PreTrainedConfig, **options) -> Backbone:
    return Backbone(
        lambda: model(config(vision_config=vision, text_config=text, image_token_index=IMAGE, **options)),
        rf".*language_model.*\.mlp\.{FFN}|.*multi_modal_projector\.linear_[12]",
        tensors=stacked(28),
    )


def text_only(config: T.PreTrainedConfig, targets: str = rf".*\.mlp\.{FFN}") -> Backbone:
    return Backbone(lambda: T.AutoModelForCausalLM.from_config(config), targets)


GRID_TOWER = dict(depth=2, hidden_size=32, intermediate_size=32, num_heads=2, out_hidden_size=64)
GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 64}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
CLIP = T.CLIPVisionConfig(**TOWER, projection_dim=16)
SIGLIP = T.SiglipVisionConfig(**TOWER, vision_use_head=False)
OPT_TEXT = {name: value for name, value in TEXT.items() if name not in ("intermediate_size", "num_key_value_heads")}
OPT = T.OPTConfig(**OPT_TEXT, ffn_dim=64, word_embed_proj_dim=64, dropout=0.0)
DEEP_MERGERS = r"(merger|deepstack_merger_list\.\d+)\.linear_fc[12]"
LINEAR_ATTENTION = dict(
    layer_types=["linear_attention", "full_attention"],
    linear_key_head_dim=16,
    linear_value_head_dim=16,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
)

BACKBONES = {
    "llava": llava_like(
        T.LlavaConfig,
        T.LlavaForConditionalGeneration,
        CLIP,
        T.LlamaConfig(**TEXT),
        vision_feature_layer=-2,
        image_seq_length=4,
    ),
    "vipllava": llava_like(
        T.VipLlavaConfig,
        T.VipLlavaForConditionalGeneration,
        CLIP,
        T.LlamaConfig(**TEXT),
        vision_feature_layers=[-2, -1],
        image_seq_length=4,
    ),
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
    "llava_next": tiles_of(T.LlavaNextConfig, T.LlavaNextForConditionalGeneration, CLIP, T.LlamaConfig(**TEXT)),
    "llava_next_video": tiles_of(
        T.LlavaNextVideoConfig, T.LlavaNextVideoForConditionalGeneration, CLIP, T.LlamaConfig(**TEXT)
    ),
    "llava_onevision": tiles_of(
        T.LlavaOnevisionConfig,
        T.LlavaOnevisionForConditionalGeneration,
        SIGLIP,
        T.Qwen2Config(**TEXT),
        video_token_index=VIDEO,
    ),
    "qwen2_vl": qwen("Qwen2VL", rope(), {"embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2}, r"merger\.mlp\.[02]"),
    "qwen2_5_vl": qwen("Qwen2_5_VL", rope(), {"window_size": 56, "fullatt_block_indexes": [1]}, r"merger\.mlp\.[02]"),
    "qwen3_vl": qwen(
        "Qwen3VL",
        {"head_dim": 16, **rope(mrope_interleaved=True)},
        {"num_position_embeddings": 64, "deepstack_visual_indexes": [0]},
        DEEP_MERGERS,
        patch=16,
    ),
    "qwen3_5": qwen(
        "Qwen3_5",
        {
            "head_dim": 16,
            **LINEAR_ATTENTION,
            **rope(mrope_interleaved=True, mrope_section=[1, 1, 0], partial_rotary_factor=0.25),
        },
        {"num_position_embeddings": 64},
        r"merger\.linear_fc[12]",
        patch=16,
    ),
    "qwen3_vl_moe": qwen(
        "Qwen3VLMoe",
        {"head_dim": 16, **rope(mrope_interleaved=True), **EXPERTS, "mlp_only_layers": [0]},
        {"num_position_embeddings": 64, "deepstack_visual_indexes": [0]},
        DEEP_MERGERS,
        patch=16,
    ),
    "glm4v": qwen(
        "Glm4v",
        rope(partial_rotary_factor=1.0),
        {"image_size": 56},
        r"merger\.(proj|gate_proj|up_proj|down_proj)",
        "(gate_up_proj|down_proj)",
        vision_start_token_id=START,
        image_start_token_id=START,
        image_end_token_id=END,
        video_start_token_id=7,
        video_end_token_id=7,
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
        tensors=stacked(56, tiles=True),
        kinds=2,
    ),
    "idefics3": idefics("Idefics3"),
    "smolvlm": idefics("SmolVLM"),
    "paligemma": Backbone(
        lambda: T.PaliGemmaForConditionalGeneration(
            T.PaliGemmaConfig(
                vision_config=T.SiglipVisionConfig(**TOWER, vision_use_head=False, projection_dim=64),
                text_config=T.Gemma2Config(**{**TEXT, **GEMMA}),
                image_token_index=IMAGE,
                projection_dim=64,
                hidden_size=64,
                vocab_size=VOCABULARY,
                tie_word_embeddings=False,
            )
        ),
        rf".*language_model.*\.mlp\.{FFN}|.*multi_modal_projector\.linear",
        tensors=stacked(28),
        extra=lambda inputs: {"token_type_ids": (inputs["labels"] != -100).long()} if "labels" in inputs else {},
    ),
    "gemma3": Backbone(
        lambda: T.Gemma3ForConditionalGeneration(
            T.Gemma3Config(
                vision_config=T.SiglipVisionConfig(**{**TOWER, "image_size": 56}, vision_use_head=False),
                text_config={**TEXT, **GEMMA, "sliding_window_pattern": 2},
                image_token_index=IMAGE,
                boi_token_index=START,
                eoi_token_index=END,
                mm_tokens_per_image=4,
                tie_word_embeddings=False,
            )
        ),
        rf".*language_model.*\.mlp\.{FFN}",
        tokens=lambda kind: [START, *[IMAGE] * 4, END],
        tensors=stacked(56),
        extra=lambda inputs: {"token_type_ids": (inputs["input_ids"] == IMAGE).long()},
    ),
    "llama4": Backbone(
        lambda: T.Llama4ForConditionalGeneration(
            T.Llama4Config(
                vision_config=dict(
                    TOWER,
                    image_size=56,
                    intermediate_size=128,
                    vision_output_dim=64,
                    projector_input_dim=64,
                    projector_output_dim=64,
                    pixel_shuffle_ratio=0.5,
                ),
                text_config=dict(
                    TEXT,
                    head_dim=16,
                    intermediate_size_mlp=64,
                    num_local_experts=4,
                    moe_layers=[1],
                    attention_chunk_size=128,
                ),
                image_token_index=IMAGE,
                boi_token_index=START,
                eoi_token_index=END,
            )
        ),
        rf"language_model.*\.feed_forward\.(shared_expert\.)?{FFN}|multi_modal_projector\.linear_1|"
        r"vision_model\.vision_adapter\.mlp\.fc[12]",
        tokens=lambda kind: [START, *[IMAGE] * (4, 8)[kind], END],
        tensors=stacked(56, tiles=True),
        kinds=2,
    ),
    "mllama": Backbone(
        lambda: T.MllamaForConditionalGeneration(
            T.MllamaConfig(
                vision_config=dict(
                    hidden_size=32,
                    intermediate_size=32,
                    num_hidden_layers=2,
                    num_global_layers=1,
                    attention_heads=2,
                    image_size=28,
                    patch_size=14,
                    vision_output_dim=64,
                    intermediate_layers_indices=[0],
                    supported_aspect_ratios=[[1, 1], [1, 2]],
                    max_num_tiles=2,
                ),
                text_config=dict(
                    TEXT,
                    num_hidden_layers=3,
                    cross_attention_layers=[1],
                    rope_parameters={"rope_type": "default", "rope_theta": 1e4},
                ),
                image_token_index=IMAGE,
            )
        ),
        rf"model\.language_model.*\.mlp\.{FFN}|model\.multi_modal_projector",
        tokens=lambda kind: [IMAGE],
        tensors=seen_by_layers,
        kinds=2,
        whole_samples=True,
        extra=lambda inputs: (
            {
                "cross_attention_mask": inputs["aspect_ratio_mask"][:, None]
                .expand(-1, inputs["input_ids"].shape[1], -1, -1)
                .clone()
            }
            if "aspect_ratio_mask" in inputs
            else {}
        ),
    ),
    "blip2_llama": qformer("Blip2", T.LlamaConfig(**TEXT), rf"mlp\.{FFN}"),
    "blip2_opt": qformer("Blip2", OPT, "(fc1|fc2)"),  # whose feed-forward layers see no samples
    "instructblip": qformer("InstructBlip", T.LlamaConfig(**TEXT), rf"mlp\.{FFN}"),
}
MOE = rf".*(\.mlp|shared_expert)\.{FFN}"
TEXT_ONLY = {
    "llama": text_only(T.LlamaConfig(**TEXT)),
    "mistral": text_only(T.MistralConfig(**TEXT)),
    "qwen2": text_only(T.Qwen2Config(**TEXT)),
    "qwen3": text_only(T.Qwen3Config(**TEXT, head_dim=16)),
    "gemma": text_only(T.GemmaConfig(**TEXT, head_dim=16)),
    "gemma2": text_only(T.Gemma2Config(**TEXT, **GEMMA)),
    "gemma3_text": text_only(T.Gemma3TextConfig(**TEXT, **GEMMA, sliding_window_pattern=2)),
    "phi3": text_only(T.Phi3Config(**TEXT), r".*\.mlp\.(gate_up_proj|down_proj)"),
    # its shared expert sees no samples
    "qwen2_moe": text_only(T.Qwen2MoeConfig(**TEXT, **EXPERTS, shared_expert_intermediate_size=32), MOE),
    "qwen3_moe": text_only(T.Qwen3MoeConfig(**TEXT, **EXPERTS, head_dim=16, mlp_only_layers=[0]), MOE),
}
