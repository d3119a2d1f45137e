"""Kernels of uso_engine: each module is a formula, a plain PyTorch reference, and a fused Triton kernel."""
