"""Protocols by name and what opening them demands."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError

import pytest

from fastdiff.evaluation import get_protocol, open_protocol
from fastdiff.evaluation.benchmark import prompts_folder, read_prompts
from fastdiff.evaluation.metrics import cosines
from fastdiff.evaluation.protocol import COCO_DMD2, EMOJI, EMOJI_VALIDATION, Protocol


def test_names_are_found_and_near_misses_named():
    assert get_protocol("emoji-2k/tower-v1") is EMOJI
    with pytest.raises(ValueError, match="did you mean 'emoji-2k/tower-v1'"):
        get_protocol("emoji-2k/tower")
    with pytest.raises(FrozenInstanceError):
        EMOJI.n = 100


def test_the_reference_is_never_the_half_behind_the_prompts():
    for protocol in (EMOJI, EMOJI_VALIDATION):
        assert protocol.reference != protocol.floor
    assert EMOJI.prompts != EMOJI_VALIDATION.prompts and EMOJI.seed != EMOJI_VALIDATION.seed


def test_the_coco_preset_says_what_to_fetch(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"needs prompts.*val2014\.zip.*ViT-g-14"):
        open_protocol("coco30k-dmd2")
    (tmp_path / "prompts.txt").write_text("a cat\n" * COCO_DMD2.n)
    with pytest.raises(FileNotFoundError, match="needs extractor_weights"):
        open_protocol(COCO_DMD2, prompts=tmp_path / "prompts.txt")


@pytest.fixture
def files(tower, tmp_path, tiny_benchmark):
    lines = [{"prompt": f"thing {i}", "concept": str(i), "style": "s", "group": "g"} for i in range(12)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    bench = tiny_benchmark(tower)
    return tmp_path / "prompts.jsonl", bench.reference.save(tmp_path / "reference.npz")


def test_opening_with_own_files(files, tower_folder):
    prompts, reference = files
    protocol = Protocol("own", n=10, resolution=32)
    bench = open_protocol(protocol, prompts=prompts, reference=reference, extractor_weights=tower_folder)
    assert bench.prompts[3] == "thing 3" and len(bench.prompts) == 10 and bench.groups[0] == "g"
    assert bench.clip is bench.extractor and len(bench.reference) == 12 and bench.teacher is None
    assert bench.settings()["reference_sha256"] == bench.reference.manifest["sha256"]


def test_another_tower_is_another_protocol(files, tower_folder):
    prompts, reference = files
    protocol = Protocol("own", n=10, resolution=32, extractor_sha256="0" * 64)
    with pytest.raises(ValueError, match="needs another name"):
        open_protocol(protocol, prompts=prompts, reference=reference, extractor_weights=tower_folder)


@pytest.mark.parametrize("name", ["emoji-2k/tower-v1", "emoji-2k-validation/tower-v1"])
def test_shipped_protocols_open(name):
    bench = open_protocol(name)
    assert len(bench.prompts) == len(bench.reference) == len(bench.floor) == 2000
    captions = bench.clip.text_features(bench.prompts[:200])
    matched = cosines(bench.floor.features[:200], captions).mean()
    shifted = cosines(bench.floor.features[:200], captions.roll(1, 0)).mean()
    assert matched > shifted + 0.3  # row i of the floor is the image behind prompt i


def test_too_few_prompts_are_refused(files, tower_folder):
    prompts, reference = files
    with pytest.raises(ValueError, match="needs 13 prompts, the list has 12"):
        open_protocol(Protocol("own", n=13, resolution=32), prompts=prompts, reference=reference)


def test_prompt_files(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a"}\n\n{"caption": "b"}\n')
    with pytest.raises(ValueError, match="line 3"):
        read_prompts(path)
    path.write_text("\n")
    with pytest.raises(ValueError, match="no prompts"):
        read_prompts(path)
    text = tmp_path / "prompts.txt"
    text.write_text("one\n\ntwo\n")
    assert read_prompts(text) == [{"prompt": "one"}, {"prompt": "two"}]


def test_shipped_prompt_lists_fit_the_protocol():
    folder = prompts_folder()
    test = read_prompts(folder / EMOJI.prompts)
    assert len(test) == EMOJI.n and len(read_prompts(folder / EMOJI_VALIDATION.prompts)) == EMOJI.n
    retrieval, diversity = read_prompts(folder / EMOJI.retrieval), read_prompts(folder / EMOJI.diversity)
    assert len(diversity) == 64
    main = {(line["prompt"], line["concept"], line["style"]) for line in test}
    assert all((line["prompt"], line["concept"], line["style"]) in main for line in retrieval)
    for block in {line["block"] for line in retrieval}:
        concepts = [line["concept"] for line in retrieval if line["block"] == block]
        assert len(concepts) == len(set(concepts)) == 100
