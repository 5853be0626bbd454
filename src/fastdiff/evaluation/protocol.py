"""Named protocols: everything that fixes a number besides the model."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, replace

from fastdiff.evaluation.resizing import NO_RESIZE, Resize


@dataclass(frozen=True)
class Protocol:
    """Settings of an evaluation. File names are resolved by ``open_protocol``; None means the user gives the file.

    name: what every number carries; prompts: prompt list; n: samples; resolution: of the generated images; resize:
    before the feature extractor; extractor: "measuring-tower" or "inception"; extractor_sha256: of its weights; clip: "measuring-tower" or an open_clip
    name; clip_prefix: put before each caption; reference: features of real images, disjoint from those behind the
    prompts; floor: features of the real images behind the prompts, in their order; teacher: features of the teacher's
    own samples; seed: of the samples (every stream of noise comes from it and a stream name, so samples never share
    noise with a reference); retrieval: candidate blocks; diversity: captions to draw ``diversity_samples`` images each
    of; draws: half-samples for the intervals; fetch: what the user must bring, and from where.
    """

    name: str
    n: int
    resolution: int
    prompts: str | None = None
    resize: Resize = NO_RESIZE
    extractor: str = "measuring-tower"
    extractor_sha256: str | None = None
    clip: str = "measuring-tower"
    clip_prefix: str = ""
    reference: str | None = None
    floor: str | None = None
    teacher: str | None = None
    seed: int = 10
    retrieval: str | None = None
    diversity: str | None = None
    diversity_samples: int = 8
    draws: int = 10
    fetch: str = ""


EMOJI = Protocol(
    name="emoji-2k/tower-v1",
    n=2000,
    resolution=32,
    prompts="emoji_test.jsonl",
    extractor_sha256="5996e4f0e45666943b18bd67806b5a7bc7be3b2a671fa96eaaa3e478e6cfe6a2",
    # The other half is the reference: the floor row (real images behind the prompts) then is what a perfect model gets
    reference="emoji-validation.npz",
    floor="emoji-test.npz",
    teacher="teacher-50-w1.npz",
    retrieval="emoji_retrieval.jsonl",
    diversity="emoji_diversity.txt",
)

EMOJI_VALIDATION = replace(
    EMOJI,
    name="emoji-2k-validation/tower-v1",
    prompts="emoji_validation.jsonl",
    reference="emoji-test.npz",
    floor="emoji-validation.npz",
    retrieval=None,
    diversity=None,
    seed=11,
)

COCO_DMD2 = Protocol(
    name="coco30k-dmd2",
    n=30_000,
    resolution=512,
    resize=Resize(lanczos=256, bicubic=299),
    extractor="inception",
    clip="ViT-g-14",
    clip_prefix="A photo depicts ",
    fetch=(
        "prompts: 30,000 captions of COCO val2014, one a line; reference: a folder with all 40,504 images of COCO "
        "val2014 (images.cocodataset.org/zips/val2014.zip); extractor_weights: "
        "weights-inception-2015-12-05-6726825d.pth of github.com/toshas/torch-fidelity/releases; clip_weights: "
        "open_clip's ViT-g-14, laion2b_s12b_b42k"
    ),
)
"""Settings of the DMD2 evaluation on Stable Diffusion 1.5 (arXiv:2405.14867): seed 10, centre crop, Lanczos to 256,
"clean" bicubic to 299, whole val2014 as reference. The authors filter in float and do not round to 8 bit after the
last resize."""

PROTOCOLS = (EMOJI, EMOJI_VALIDATION, COCO_DMD2)


def get_protocol(name: str) -> Protocol:
    """The protocol of that name.

    Raises:
        ValueError: no such protocol; the message names the nearest.
    """
    names = [p.name for p in PROTOCOLS]
    if name not in names:
        near = difflib.get_close_matches(name, names, 1, 0.0)[0]
        raise ValueError(f"no protocol {name!r}; did you mean {near!r}? There are {', '.join(names)}")
    return PROTOCOLS[names.index(name)]
