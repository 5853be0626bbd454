"""Prompts, captioned images and caches of precomputed tensors, and which item a run sees when."""

from fastdiff.data.cache import CacheError, CacheMeta, CacheMismatchError, CacheReader, CacheRecord, CacheWriter
from fastdiff.data.images import ImageExample, ImageSource
from fastdiff.data.opening import DataKind, UnsuitableDataError, open_images, open_training_data, recognise
from fastdiff.data.prompts import PromptFileError, read_prompts
from fastdiff.data.rejects import Reject, RejectedImage, Rejects, TooManyRejects
from fastdiff.data.sampler import EpochPermutation, StepBatches, Visit, global_positions
from fastdiff.data.source import CachedData, ChosenData, ImageTextData, PromptData, TrainingData
from fastdiff.data.transform import ImageTransform

__all__ = [
    "CacheError",
    "CacheMeta",
    "CacheMismatchError",
    "CacheReader",
    "CacheRecord",
    "CacheWriter",
    "CachedData",
    "ChosenData",
    "DataKind",
    "EpochPermutation",
    "ImageExample",
    "ImageSource",
    "ImageTextData",
    "ImageTransform",
    "PromptData",
    "PromptFileError",
    "Reject",
    "RejectedImage",
    "Rejects",
    "StepBatches",
    "TooManyRejects",
    "TrainingData",
    "UnsuitableDataError",
    "Visit",
    "global_positions",
    "open_images",
    "open_training_data",
    "read_prompts",
    "recognise",
]
