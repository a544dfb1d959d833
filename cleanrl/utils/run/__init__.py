"""A training run: its options, folder, checkpoints, curves, videos and models. The door is `training_run`."""
