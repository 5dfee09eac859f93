"""Tempera's trainer: typed args build a run of small parts; one generator steps it."""
