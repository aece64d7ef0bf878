"""Triton kernels for NVIDIA and AMD GPUs, installed as `lomix_fast.kernels`. They import triton and torch only.

    launch.py     forward and backward as PyTorch functions: buffers, launch configuration, sums over programs
    tables.py     what kernels read instead of taking hundreds of arguments: maps of a plan, sizes and strides
    config.py     tile sizes and warps for a device, from a small table
    forward.py    the statistics of all maps           backward.py   the gradients of all maps
    maps.py       the four mixes and the softmax, for a few classes at a time
    stage.py      logits interpolated to a tile        adjoint.py    and gradients taken back
    pixels.py     where a tile lies, and what an output pixel reads
    aot.py        compilation for GPUs that are not here

Names: `p_` pointer, `px` offsets of pixels in a tile, `c0` first class of a vector; shapes stand beside tensors.
This package must not be imported without triton; `lomix_fast.triton_backend` looks before it does.
"""
