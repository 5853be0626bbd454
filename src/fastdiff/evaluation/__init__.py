"""Images from any diffusers pipeline, metrics under named protocols, and a report. Knows nothing of training."""

from fastdiff.evaluation.benchmark import Benchmark, open_protocol, prompts_folder
from fastdiff.evaluation.evaluate import evaluate, floor_row, load_pipeline, teacher_features
from fastdiff.evaluation.features import FeatureFileError, ImageFeatures
from fastdiff.evaluation.generation import Samples, generate, sample_seeds
from fastdiff.evaluation.grid import draw_grid, grid_images
from fastdiff.evaluation.protocol import PROTOCOLS, Protocol, get_protocol
from fastdiff.evaluation.report import format_table, write_report
from fastdiff.evaluation.row import Row, excess, score

__all__ = [
    "PROTOCOLS",
    "Benchmark",
    "FeatureFileError",
    "ImageFeatures",
    "Protocol",
    "Row",
    "Samples",
    "draw_grid",
    "evaluate",
    "excess",
    "floor_row",
    "format_table",
    "generate",
    "get_protocol",
    "grid_images",
    "load_pipeline",
    "open_protocol",
    "prompts_folder",
    "sample_seeds",
    "score",
    "teacher_features",
    "write_report",
]
