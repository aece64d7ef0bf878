"""The benchmark of the loss: `python -m benchmarks` from the top of the repository; see README.md beside this file."""
