"""The configuration of a small LLaVA from its parts' sizes."""

import torch
from transformers import LlavaForConditionalGeneration

from smolora.official.llava import llava_config


def test_a_picture_has_as_many_tokens_as_patches():
    config = llava_config(
        vision={
            "image_size": 28,
            "patch_size": 14,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
        },
        text={
            "vocab_size": 20,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
        },
        image_token=3,
        feature_layer=-1,
        tie_word_embeddings=False,
    )
    assert (config.image_token_id, config.image_seq_length, config.vision_feature_layer) == (3, 4, -1)
    assert config.text_config.num_key_value_heads == 4 and not config.tie_word_embeddings
    model = LlavaForConditionalGeneration(config).eval()
    ids = torch.tensor([[1, 3, 3, 3, 3, 5]])
    with torch.no_grad():
        logits = model(input_ids=ids, pixel_values=torch.zeros(1, 3, 28, 28)).logits
    assert logits.shape == (1, 6, 20)
