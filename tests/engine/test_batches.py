"""Prompts that are not cached are encoded once, within a bound of memory."""

from __future__ import annotations

import itertools

import torch
from engine_helpers import PROMPTS, Latents

from fastdiff.engine import Settings, batches
from fastdiff.models.teacher import Teacher


def encoded(teacher, data, count: int) -> list[list[str]]:
    """The prompts of each call of the encoders while `count` batches are made."""
    calls, encode = [], teacher.encode
    teacher.encode = lambda prompts, resolution: (calls.append(list(prompts)), encode(prompts, resolution))[1]
    settings = Settings(train_batch_size=1, max_train_steps=count, report_to="none")
    made = batches.Batches(data, teacher, settings, torch.device("cpu"), 0, 1)
    for micro in made.steps(0):
        wanted = encode(list(micro[0].prompts), made.resolution)
        assert all(torch.equal(micro[0].cond.tensors[name], wanted.tensors[name]) for name in wanted.tensors)
    return calls


def test_every_prompt_is_encoded_once(tiny_sd):
    calls = encoded(Teacher(tiny_sd), Latents(PROMPTS), 4 * len(PROMPTS))
    assert sorted(itertools.chain(*calls)) == sorted(PROMPTS)


def test_what_is_kept_is_bounded_in_bytes(tiny_sd, monkeypatch):
    teacher = Teacher(tiny_sd)
    row = sum(tensor.numel() * tensor.element_size() for tensor in teacher.null(32).tensors.values())
    monkeypatch.setattr(batches, "_MEMORY_BYTES", 2 * row)
    calls = encoded(teacher, Latents(PROMPTS), 4 * len(PROMPTS))
    assert len(list(itertools.chain(*calls))) > 2 * len(PROMPTS)
