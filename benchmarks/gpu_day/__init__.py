"""`make gpu-day`: one command that answers what only a GPU can, in eight minutes; docs/gpu.md says how to run it.

__main__.py  the steps in their order, each with a limit of time
day.py       rows, clocks: what steps share             workers.py   the processes that touch the device
problems.py  what is timed                              child.py     programs with a limit of time
build.py     compiles for the card that is there        right.py     every case against float64
features.py  tests/test_gpu.py, a few tests a process   fast.py      times, launches, memory, against the others
small.py     the largest batch that fits                limits.py    rates of the card (rates.cu), ncu.py, sanitizer.py
floors.py    the least time that a step can take        one_step.py  what ncu and compute-sanitizer watch
promises.py  verdicts                                   record.py    CSV, JSON, table
stand_in.py  plays the GPU in a rehearsal, tool_stand_ins.py its tools; faults.py: what may go wrong, to rehearse it
compile_triton.py  compiles all Triton kernels for a GPU that is not here (make versions)
"""
