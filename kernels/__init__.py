"""Triton kernels for NVIDIA and AMD GPUs, installed as `lomix_fast.kernels`.

    launch.py     forward and backward as PyTorch functions: buffers, launch configuration, sums over programs
    problem.py    one call in the form that kernels take
    tables.py     what kernels read instead of taking hundreds of arguments: maps of a plan, sizes and strides
    config.py     tile sizes and warps for a device, from a small table
    forward.py    the statistics of all maps           backward.py   the gradients of all maps
    general.py    the same statistics for targets with weights, several classes at once, and sigmoids
    map_gradient.py, general_gradient.py    the gradient of one map, likewise
    maps.py       the mixes and the softmax, for a few classes at a time
    labels.py     class numbers of a tile                targets.py  and whatever else a target may hold
    sigmoid.py    sigmoids and their cross-entropy
    stage.py      logits interpolated to a tile        adjoint.py    and gradients taken back
    pixels.py     where a tile lies, and what an output pixel reads
    aot.py        compilation for GPUs that are not here

Besides triton and torch they import lomix_fast.plan and lomix_fast.target, which need neither kernels nor an extension.
Names: `p_` pointer, `px` offsets of pixels in a tile, `c0` first class of a vector; shapes stand beside tensors.
This package must not be imported without triton; `lomix_fast.triton_backend` looks before it does.
"""
