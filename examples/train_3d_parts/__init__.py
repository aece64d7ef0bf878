"""The parts of train_3d.py, one idea a file; the training loop itself is there."""
