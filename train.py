"""Trains a concept: `python train.py object pictures/`, or as Cog's training door (cog.yaml).

Cog reads the signature of `train` without running this file, so its lines are literal.
"""

from __future__ import annotations

import sys

from cog import BaseModel, Input
from cog import Path as CogPath

from trainer.__main__ import main


class TrainingOutput(BaseModel):
    weights: CogPath


def train(
    input_images: CogPath = Input(description="zip of 5 to 50 pictures; x.txt beside x.png is its caption"),
    trigger_word: str = Input(default="TOK", description="word that stands for the concept in captions and prompts"),
    concept_mode: str = Input(
        default="object", choices=["object", "style", "face"], description="preset that the other inputs start from"
    ),
    steps: int | None = Input(default=None, ge=1, description="optimizer updates; blank: from the number of pictures"),
    lora_rank: int | None = Input(default=None, ge=1, le=1024, description="inner dimension; blank: the preset's"),
    learning_rate: float | None = Input(default=None, description="of the LoRA; blank: the preset's"),
    ti_lr: float | None = Input(default=None, description="learning rate of the token vectors; blank: the preset's"),
    batch_size: int | None = Input(default=None, ge=1, description="pictures in one forward; blank: the preset's"),
    resolution: int | None = Input(default=None, ge=16, le=4096, description="pixels; blank: the base's own"),
    seed: int | None = Input(default=None, ge=0, description="blank: 0"),
    args: str = Input(default="{}", description="any further options as JSON, such as the sections of a preset"),
) -> TrainingOutput:
    """Trains on the pictures; `weights` is a tar with the files for the clients, the report and the args."""
    inputs = dict(locals())
    from trainer import cog_door

    return TrainingOutput(weights=CogPath(cog_door.train(inputs)))


if __name__ == "__main__":
    sys.exit(main())
