"""LPIPS and SAM as scorers, on random weights: what they compute, where gradients go, what they refuse."""

from __future__ import annotations

import pytest
import torch
from torchmetrics.functional.image.lpips import _LPIPS
from transformers import SamVisionConfig, SamVisionModel

from fastdiff.methods import FlashDMD, FlashDMDConfig
from fastdiff.models.image_scorers import LpipsScorer, SamScorer
from fastdiff.models.scorers import TowerScorer, open_scorer


@pytest.fixture(scope="module")
def lpips():
    torch.manual_seed(0)
    return LpipsScorer(_LPIPS(net="squeeze", pnet_rand=True))


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    config = SamVisionConfig(
        hidden_size=32, output_channels=16, num_hidden_layers=3, num_attention_heads=2, image_size=64, patch_size=16,
        mlp_dim=64, window_size=2, global_attn_indexes=[0, 2], num_pos_feats=8,
    )  # fmt: skip
    return SamVisionModel(config).eval()


def images(rows=2, side=64, seed=0):
    return 2 * torch.rand(rows, 3, side, side, generator=torch.Generator().manual_seed(seed)) - 1


def test_lpips_is_that_of_torchmetrics_for_each_pair(lpips):
    a, b = images(), images(seed=1)
    expected = torch.cat([lpips.network(a[i : i + 1], b[i : i + 1]).flatten() for i in range(2)])
    torch.testing.assert_close(lpips.distance(a, b), expected, rtol=1e-4, atol=1e-5)
    assert lpips.distance(a, a).abs().max() == 0 and (expected > 0).all()


def test_sam_features_are_the_global_blocks_and_the_neck(encoder):
    scorer = SamScorer(encoder)
    features = scorer.features(images())
    assert [tuple(f.shape) for f in features] == [(2, 32, 4, 4), (2, 32, 4, 4), (2, 16, 4, 4)]
    assert scorer.feature_channels == (32, 32, 16)
    seen = []
    handles = [
        encoder.vision_encoder.layers[i].register_forward_hook(lambda *hook: seen.append(hook[2] if torch.is_tensor(hook[2]) else hook[2][0]))
        for i in (0, 2)
    ]  # fmt: skip
    again = scorer.features(images())
    for handle in handles:
        handle.remove()
    for output, feature in zip(seen, again):
        torch.testing.assert_close(output.permute(0, 3, 1, 2), feature)


def test_sam_sees_images_as_it_was_trained(encoder):
    """Mid-grey is (0.5 - mean) / std of each channel; another size is resized."""
    seen = []
    handle = encoder.vision_encoder.patch_embed.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    SamScorer(encoder).features(torch.zeros(1, 3, 16, 16))
    handle.remove()
    grey = torch.tensor([(0.5 - 0.485) / 0.229, (0.5 - 0.456) / 0.224, (0.5 - 0.406) / 0.225]).view(1, 3, 1, 1)
    torch.testing.assert_close(seen[0], grey.expand(1, 3, 64, 64), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["lpips", "sam"])
def test_gradients_reach_the_images_and_nothing_else(kind, lpips, encoder):
    scorer = lpips if kind == "lpips" else SamScorer(encoder)
    x = images().requires_grad_()
    sum(feature.square().mean() for feature in scorer.features(x)).backward()
    assert torch.isfinite(x.grad).all() and x.grad.abs().max() > 0
    assert all(p.grad is None and not p.requires_grad for p in scorer.network.parameters())
    with pytest.raises(ValueError, match="knows no text"):
        scorer.text_embedding(["a dog"])


def test_a_folder_of_a_sam_encoder_is_opened(encoder, tmp_path):
    encoder.save_pretrained(tmp_path)
    scorer = open_scorer(str(tmp_path))
    assert isinstance(scorer, SamScorer) and isinstance(open_scorer("loss_tower"), TowerScorer)
    for one, other in zip(scorer.features(images()), SamScorer(encoder).features(images())):
        torch.testing.assert_close(one, other)
    with pytest.raises(ValueError, match="no perceptual distance"):
        scorer.distance(images(), images())


def test_a_discriminator_has_a_head_for_each_activation(encoder):
    method = FlashDMD(FlashDMDConfig(gan_weight=0.1))
    heads = method.scorer_modules(SamScorer(encoder))["discriminator"]
    assert heads(*SamScorer(encoder).features(images())).shape[0] == 2
