"""Students of the two pipelines whose files tests read back."""

import copy

import pytest
from export_helpers import Trained

from fastdiff.models.sampler import SamplerSpec


@pytest.fixture
def trained_sd(tiny_sd):
    return Trained(tiny_sd, SamplerSpec.trailing("lcm", 2))


@pytest.fixture
def trained_sdxl(tiny_sdxl):
    return Trained(tiny_sdxl, SamplerSpec.trailing("ddim", 2))


@pytest.fixture(params=["sd", "sdxl"])
def trained(request):
    return request.getfixturevalue(f"trained_{request.param}")


@pytest.fixture
def fresh(_sd_original, _sdxl_original):
    """Loads the teacher anew: a stock pipeline without adapters, of the class asked for."""
    originals = {type(p).__name__: p for p in (_sd_original, _sdxl_original)}
    return lambda pipeline: lambda: copy.deepcopy(originals[type(pipeline).__name__])
