"""Finished weights on a base -> pictures: found, read, put on the base at strengths, drawn with, written down."""

from trainer.generate.find import GenerateError, Weights, base_of, find, opened
from trainer.generate.order import Order, carry_out, prompts_of, start
from trainer.generate.painter import Learned, Look, Painter, Weighted, device
from trainer.generate.record import facts, free_names, parameters, save
from trainer.generate.strength import Strength, parse

__all__ = [
    "GenerateError",
    "Learned",
    "Look",
    "Order",
    "Painter",
    "Strength",
    "Weighted",
    "Weights",
    "base_of",
    "carry_out",
    "device",
    "facts",
    "find",
    "free_names",
    "opened",
    "parameters",
    "parse",
    "prompts_of",
    "save",
    "start",
]
