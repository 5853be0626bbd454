"""Numbers from features. Distances come from torch-fidelity; the rest are means of per-image values."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def frechet_distance(generated: Tensor, reference: Tensor) -> float:
    """Frechet distance between Gaussians fitted to features (N, D) and (M, D) (arXiv:1706.08500), in float64."""
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric

    statistics = [fid_features_to_statistics(features.double().cpu()) for features in (generated, reference)]
    return fid_statistics_to_metric(*statistics, verbose=False)[KEY_METRIC_FID]


def kernel_distance(generated: Tensor, reference: Tensor, subsets: int = 20, seed: int = 0) -> tuple[float, float]:
    """Kernel distance with the cubic kernel (KID, arXiv:1801.01401): mean over random half-size subsets, and a
    standard error. The spread over halves is that of the whole sample (``half_sample_error``)."""
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

    size = min(len(generated), len(reference)) // 2
    result = kid_features_to_metric(
        generated.double(),
        reference.double(),
        kid_subsets=subsets,
        kid_subset_size=size,
        rng_seed=seed,
        verbose=False,
    )
    return result[KEY_METRIC_KID_MEAN], result[KEY_METRIC_KID_STD]


def precision_recall(generated: Tensor, reference: Tensor) -> tuple[float, float]:
    """Share of generated images inside the references' 3-nearest-neighbour balls, and the converse
    (arXiv:1904.06991)."""
    from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

    result = prc_features_to_metric(generated.float(), reference.float(), verbose=False)
    return result[KEY_METRIC_PRECISION], result[KEY_METRIC_RECALL]


def cosines(images: Tensor, texts: Tensor) -> Tensor:
    """Cosine of each image with its caption, (N,) from (N, D) and (N, D); its mean is the CLIP score."""
    return torch.nn.functional.cosine_similarity(images.float(), texts.float(), dim=-1)


def retrieval_hits(images: Tensor, texts: Tensor, blocks: Sequence[int]) -> Tensor:
    """1 where an image's own caption is the nearest of all captions in its block, else 0: float32 (N,).

    Args:
        images: features (N, D).
        texts: features (N, D) of the images' captions; captions of one block are about distinct concepts.
        blocks: the candidate set each image belongs to, N integers.
    """
    images, texts = (torch.nn.functional.normalize(x.float(), dim=-1) for x in (images, texts))
    labels, hits = torch.as_tensor(blocks), torch.zeros(len(images))
    for block in labels.unique():
        members = (labels == block).nonzero().squeeze(1)
        nearest = (images[members] @ texts[members].T).argmax(dim=1)
        hits[members] = (nearest == torch.arange(len(members))).float()
    return hits


def group_diversity(features: Tensor, groups: Sequence[int]) -> Tensor:
    """Mean pairwise cosine distance among the images of each group: one value a group with at least two images."""
    features, labels = torch.nn.functional.normalize(features.double(), dim=-1), torch.as_tensor(groups)
    values = []
    for group in labels.unique():
        members = features[labels == group]
        count = len(members)
        if count > 1:
            # the sum over all pairs of unit vectors is |sum|^2; the diagonal contributes ``count``
            values.append(1 - (members.sum(0).square().sum() - count) / (count * (count - 1)))
    return torch.stack(values).float() if values else torch.zeros(0)


def gradient_energy(images: Tensor) -> Tensor:
    """Mean squared difference of neighbouring pixels in [0, 1], over both directions and all channels: (N,)."""
    pixels = images.float() / 255
    across, down = pixels.diff(dim=-1).square(), pixels.diff(dim=-2).square()
    total = across.flatten(1).sum(1) + down.flatten(1).sum(1)
    return total / (across[0].numel() + down[0].numel())


def half_sample_error(statistic: Callable[[Tensor], float], count: int, draws: int, seed: int = 0) -> float:
    """Standard error of a statistic of ``count`` samples: its spread over random halves drawn without replacement.

    ``statistic`` gets the chosen indices. Halves, since (1/m - 1/n) = 1/n at m = n/2, have the whole sample's
    variance, and, unlike resampling with replacement, put no repeated points into covariances and neighbourhoods.
    """
    generator = torch.Generator().manual_seed(seed)
    halves = (torch.randperm(count, generator=generator)[: count // 2] for _ in range(draws))
    return torch.tensor([statistic(half) for half in halves], dtype=torch.float64).std().item()


def bootstrap_interval(values: Tensor, draws: int = 1000, seed: int = 0) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean of ``values`` (N,)."""
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(len(values), (draws, len(values)), generator=generator)
    low, high = values.double()[picks].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def share_error(share: float, count: int) -> float:
    """Binomial standard error of a share of ``count`` samples."""
    return (share * (1 - share) / count) ** 0.5


def around(value: float, error: float) -> tuple[float, float]:
    """95 % normal interval."""
    return value - 1.96 * error, value + 1.96 * error
