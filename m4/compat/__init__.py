"""What other projects wrote: nano4M's configurations and checkpoints; and what takes the place of its classes."""

from m4.compat.fourm import FourM
from m4.compat.loader import create_multimodal_masked_dataloader
from m4.compat.masking import SimpleMultimodalMasking

__all__ = ["FourM", "SimpleMultimodalMasking", "create_multimodal_masked_dataloader"]
