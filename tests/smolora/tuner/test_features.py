"""Features that selectors choose by: of every architecture, a batch's samples have those that they have alone."""

from __future__ import annotations

import pytest
import torch

from smolora.tuner.features import image_dim
from support.backbones import BACKBONES

SIMILAR = ("vipllava", "llava_next_video", "qwen3_vl_moe", "qwen3_5", "smolvlm", "blip2_opt")  # to another one


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if name in SIMILAR else ()) for name in BACKBONES if name != "mllama"],
)
def test_image_features_are_of_the_sample(name):
    """Images of two sizes, two in a sample, and a sample without any, where that may be."""
    backbone, model = BACKBONES[name], BACKBONES[name].adapted()
    last = backbone.kinds - 1
    rows = [(5, [(0, 1)]), (9, [(last, 2)]), (6, [(last, 5), (0, 6)])]
    rows = rows[:2] if backbone.needs_image else [*rows, (4, [])]
    found = model.base_model.sample_features(**backbone.batch(rows)).image
    assert found.shape == (len(rows), image_dim(model.get_base_model()))
    for features, row in zip(found, rows, strict=True):
        if row[1]:
            (alone,) = model.base_model.sample_features(**backbone.batch([row])).image
            torch.testing.assert_close(features, alone, rtol=1e-4, atol=1e-5)
            assert features.norm() == pytest.approx(1, abs=1e-5)
        else:
            assert not features.any()
    with torch.no_grad():
        assert (found[0] - found[1]).abs().max() > 1e-3, "all images have the same features: the test shows nothing"


def test_a_tower_that_cannot_be_told_is_refused():
    model, backbone = BACKBONES["mllama"].adapted(), BACKBONES["mllama"]
    with pytest.raises(ValueError, match="they would be found by the output of its vision tower, which cannot be told"):
        model.base_model.sample_features(**backbone.batch([(5, [(0, 1)])]))
