"""The M4 model."""

from m4.model.config import KERNELS, AttentionConfig, ModelConfig
from m4.model.m4 import M4, CountedLosses, Losses

__all__ = ["KERNELS", "M4", "AttentionConfig", "CountedLosses", "Losses", "ModelConfig"]
