"""Triton kernels, installed as `lomix_fast.kernels`; there are none yet. They import triton and torch only."""
