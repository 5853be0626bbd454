"""Students as files: LoRA files, pipeline folders, their check in stock diffusers, the model card, the Hub."""

from fastdiff.export.bundle import ExportOptions, export_student
from fastdiff.export.card import License, teacher_license, write_card
from fastdiff.export.experts import EXPERTS_FILE, Experts, Predict, load_experts
from fastdiff.export.hub import push_to_hub
from fastdiff.export.loadback import LoadBackError, LoadBackReport, Probe, check_lora, check_pipeline, make_probe
from fastdiff.export.lora import LoraFiles, save_lora
from fastdiff.export.pipeline import Student, save_pipeline
from fastdiff.export.student import StudentRecord, read_record, write_record

__all__ = [
    "EXPERTS_FILE",
    "Experts",
    "ExportOptions",
    "License",
    "LoadBackError",
    "LoadBackReport",
    "LoraFiles",
    "Predict",
    "Probe",
    "Student",
    "StudentRecord",
    "check_lora",
    "check_pipeline",
    "export_student",
    "load_experts",
    "make_probe",
    "push_to_hub",
    "read_record",
    "save_lora",
    "save_pipeline",
    "teacher_license",
    "write_card",
    "write_record",
]
