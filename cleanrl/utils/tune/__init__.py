"""Searches for hyperparameters: `python -m cleanrl.utils.tune`.

`space` what is searched · `trials` one run for each choice · `results` the table and the picture
"""
