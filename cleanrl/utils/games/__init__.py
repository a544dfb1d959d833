"""Atari games: ids and scores, environments in worker processes, their state, statistics, video."""
