"""The lean trainer for masked multimodal models of human motion, on top of m4kernels."""
