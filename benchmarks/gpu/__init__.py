"""A report on the Triton kernels made without a GPU: `python -m benchmarks.gpu`.

sass.py, amdgcn.py   what the compilers' listings say: registers, spills, instructions by class
occupancy.py         how many programs fit on a core
compiled.py          one variant compiled and read
table.py             the CSV file, the promises, the tables of docs/gpu.md
hooks.py, counts.py  operations that one tile executes, counted in Triton's interpreter
cards.py, model.py   a MODEL of the time on three cards out of those counts; nothing in it is measured
official.py          what the literal loss moves and launches, for the same model
page.py              docs/gpu.md
"""
