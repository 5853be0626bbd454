"""Heads fit activations of any number of channels, not only of multiples of 32."""

import pytest
import torch

from fastdiff.models.discriminator import FeatureHead


@pytest.mark.parametrize("channels", [1, 48, 64, 144, 320, 1000])
def test_a_head_fits_any_width(channels):
    features = torch.randn(2, channels, 8, 8, generator=torch.Generator().manual_seed(0))
    assert FeatureHead(channels)(features).shape == (2,)
