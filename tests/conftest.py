import os

# Before any test module imports PyTorch: see the training script.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
