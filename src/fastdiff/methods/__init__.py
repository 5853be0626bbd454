"""All distillation methods. A new method adds its file, its tests, its recipe and one line to `METHODS`."""

from __future__ import annotations

import difflib

from fastdiff.methods.apex import APEX, APEXConfig
from fastdiff.methods.base import Batch, Context, Group, Method, MethodInfo, TargetNetwork, Update
from fastdiff.methods.boot import BOOT, BOOTConfig
from fastdiff.methods.ctm import CTM, CTMConfig
from fastdiff.methods.decoupled_dmd import DecoupledDMD, DecoupledDMDConfig
from fastdiff.methods.diff_instruct import DiffInstruct, DiffInstructConfig
from fastdiff.methods.disback import DisBack, DisBackConfig
from fastdiff.methods.dmd import DMD, DMDConfig
from fastdiff.methods.dmd2 import DMD2, DMD2Config
from fastdiff.methods.f_distill import FDistill, FDistillConfig
from fastdiff.methods.flash_dmd import FlashDMD, FlashDMDConfig
from fastdiff.methods.freeflow import FreeFlow, FreeFlowConfig
from fastdiff.methods.guidance_distillation import GuidanceDistillation, GuidanceDistillationConfig
from fastdiff.methods.kd import KD, KDConfig
from fastdiff.methods.ladd import LADD, LADDConfig
from fastdiff.methods.lcm import LCM, LCMConfig
from fastdiff.methods.lightning import Lightning, LightningConfig
from fastdiff.methods.meanflow import MeanFlow, MeanFlowConfig
from fastdiff.methods.msd import MSD, MSDConfig
from fastdiff.methods.pcm import PCM, PCMConfig
from fastdiff.methods.perflow import PeRFlow, PeRFlowConfig
from fastdiff.methods.pg_sb import PGSB, PGSBConfig
from fastdiff.methods.phased_dmd import PhasedDMD, PhasedDMDConfig
from fastdiff.methods.progressive import Progressive, ProgressiveConfig
from fastdiff.methods.rcm import RCM, RCMConfig
from fastdiff.methods.rectified_flow import RectifiedFlow, RectifiedFlowConfig
from fastdiff.methods.rfpp import RFPP, RFPPConfig
from fastdiff.methods.scm import SCM, SCMConfig
from fastdiff.methods.score_distillation import ScoreDistillation, ScoreDistillationConfig
from fastdiff.methods.score_matching import ScoreMatching, ScoreMatchingConfig
from fastdiff.methods.scott import SCott, SCottConfig
from fastdiff.methods.sid import SIM, SiD, SiDA, SiDAConfig, SiDConfig, SiDLSG, SiDLSGConfig, SIMConfig
from fastdiff.methods.slimflow import SlimFlow, SlimFlowConfig
from fastdiff.methods.swiftbrush import SwiftBrush, SwiftBrushConfig
from fastdiff.methods.tcd import TCD, TCDConfig
from fastdiff.methods.tcm import TCM, TCMConfig
from fastdiff.methods.tscd import TSCD, TSCDConfig
from fastdiff.methods.uni_instruct import UniInstruct, UniInstructConfig

METHODS: tuple[type[Method], ...] = (
    # distribution matching
    DMD2,
    DMD,
    DecoupledDMD,
    PhasedDMD,
    FlashDMD,
    DisBack,
    MSD,
    FDistill,
    DiffInstruct,
    SwiftBrush,
    PGSB,
    ScoreDistillation,
    ScoreMatching,
    # adversarial
    LADD,
    # Fisher divergence
    SiD,
    SiDA,
    SiDLSG,
    SIM,
    UniInstruct,
    # trajectory: consistency, phased, continuous, told ends, halving, pairs and straight lines
    LCM,
    SCott,
    PCM,
    TSCD,
    CTM,
    TCD,
    SCM,
    TCM,
    RCM,
    MeanFlow,
    FreeFlow,
    BOOT,
    APEX,
    GuidanceDistillation,
    Progressive,
    Lightning,
    KD,
    RectifiedFlow,
    RFPP,
    SlimFlow,
    PeRFlow,
)


def method_named(name: str) -> type[Method]:
    """The method class called `name`.

    Raises:
        ValueError: if there is none; the message names the nearest.
    """
    for method in METHODS:
        if method.info.name == name:
            return method
    names = [method.info.name for method in METHODS]
    near = difflib.get_close_matches(name, names, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"unknown method {name!r}; known: {', '.join(names)}.{hint}")


__all__ = [
    "APEX",
    "BOOT",
    "CTM",
    "DMD",
    "DMD2",
    "KD",
    "LADD",
    "LCM",
    "METHODS",
    "MSD",
    "PCM",
    "PGSB",
    "RCM",
    "RFPP",
    "SCM",
    "SIM",
    "TCD",
    "TCM",
    "TSCD",
    "APEXConfig",
    "BOOTConfig",
    "Batch",
    "CTMConfig",
    "Context",
    "DMD2Config",
    "DMDConfig",
    "DecoupledDMD",
    "DecoupledDMDConfig",
    "DiffInstruct",
    "DiffInstructConfig",
    "DisBack",
    "DisBackConfig",
    "FDistill",
    "FDistillConfig",
    "FlashDMD",
    "FlashDMDConfig",
    "FreeFlow",
    "FreeFlowConfig",
    "Group",
    "GuidanceDistillation",
    "GuidanceDistillationConfig",
    "KDConfig",
    "LADDConfig",
    "LCMConfig",
    "Lightning",
    "LightningConfig",
    "MSDConfig",
    "MeanFlow",
    "MeanFlowConfig",
    "Method",
    "MethodInfo",
    "PCMConfig",
    "PGSBConfig",
    "PeRFlow",
    "PeRFlowConfig",
    "PhasedDMD",
    "PhasedDMDConfig",
    "Progressive",
    "ProgressiveConfig",
    "RCMConfig",
    "RFPPConfig",
    "RectifiedFlow",
    "RectifiedFlowConfig",
    "SCMConfig",
    "SCott",
    "SCottConfig",
    "SIMConfig",
    "ScoreDistillation",
    "ScoreDistillationConfig",
    "ScoreMatching",
    "ScoreMatchingConfig",
    "SiD",
    "SiDA",
    "SiDAConfig",
    "SiDConfig",
    "SiDLSG",
    "SiDLSGConfig",
    "SlimFlow",
    "SlimFlowConfig",
    "SwiftBrush",
    "SwiftBrushConfig",
    "TCDConfig",
    "TCMConfig",
    "TSCDConfig",
    "TargetNetwork",
    "UniInstruct",
    "UniInstructConfig",
    "Update",
    "method_named",
]
