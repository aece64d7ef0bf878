"""A report on the Triton and CUDA kernels made without a GPU: `python -m benchmarks.gpu`.

sass.py, amdgcn.py   what the compilers' listings say: registers, spills, instructions by class
occupancy.py         how many programs fit on a core
compiled.py          one variant compiled and read
table.py             the CSV file, the promises, the tables of docs/gpu-model.md
hooks.py, counts.py  operations that one tile executes, counted in Triton's interpreter
cards.py, model.py   a MODEL of the time on three cards out of those counts; nothing in it is measured
official.py          what the literal loss moves and launches, for the same model
page.py              docs/gpu-model.md

The CUDA kernels for few classes:

cuda_build.py        few.cu compiled with the flags of the package's build
cuda_shapes.py       how they are launched
cuda_compiled.py     registers, spills, occupancy; the CSV file and the promises
cuda_listing.py      machine code as a list of instructions
cuda_values.py, cuda_integers.py, cuda_floats.py, cuda_decode.py, cuda_memory.py, cuda_warp.py
                     an interpreter of machine code: it executes the kernels on the CPU
cuda_call.py, cuda_run.py, cuda_counts.py
                     a launch made up, executed, and what a tile of it issues
cuda_model.py        the same MODEL out of these counts
cuda_page.py, cuda_report.py
                     their part of docs/gpu-model.md, and the files behind it
"""
