"""A training run: its options, folder, checkpoints, curves, videos and models. Start at `training_run`."""
