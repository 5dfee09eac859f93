"""Trains a concept: `python train.py object pictures/`, or as Cog's training door (cog.yaml).

Cog reads the signature of `train` without running this file, so its lines are literal.
"""

from __future__ import annotations

import sys

from trainer import console, lean
from trainer.__main__ import main

if __name__ == "__main__":  # from the command line, nothing of Cog is needed
    sys.exit(main())

from cog import BaseModel, Input, Path, Secret


class TrainingOutput(BaseModel):
    weights: Path
    hub: str | None = None


def train(
    # <inputs> made by python -m trainer.cog_inputs --write
    input_images: Path | None = Input(
        default=None,
        description="zip or tar of 2 pictures or more, usually 5 to 30, or a JSON list of URLs; x.txt beside x.png is its caption",
    ),
    trigger_word: str | None = Input(
        default=None, min_length=1, description="word in captions and prompts that stands for the concept; blank: TOK"
    ),
    token_string: str | None = Input(default=None, min_length=1, description="the same as trigger_word"),
    concept_mode: str | None = Input(
        default=None,
        choices=["object", "style", "face"],
        description="what is learned: the preset that all other inputs change; blank: object",
    ),
    autocaption: bool | None = Input(
        default=None,
        description="have captions written for pictures that come without one; by florence2, or by captioner",
    ),
    captioner: str | None = Input(
        default=None,
        description="captions for pictures that come without one: a name of preprocess.captioners; sidecar leaves them to data.caption, none does so with all pictures; blank: sidecar",
    ),
    autocaption_prefix: str | None = Input(
        default=None, description="put before every caption; {trigger} stands for the trigger; blank: nothing"
    ),
    caption_prefix: str | None = Input(default=None, description="the same as autocaption_prefix"),
    autocaption_suffix: str | None = Input(
        default=None, description="put after every caption; {trigger} stands for the trigger; blank: nothing"
    ),
    mask_target_prompts: str | None = Input(
        default=None,
        min_length=1,
        description="learn only what fits these words (a red hat), found by the CLIPSeg model that args names as data.mask.base",
    ),
    steps: int | None = Input(
        default=None, ge=1, description="optimizer updates; blank: 30 for each picture, 300 to 2000"
    ),
    max_train_steps: int | None = Input(default=None, ge=1, description="the same as steps"),
    learning_rate: float | None = Input(
        default=None,
        description="peak learning rate of the adapter; blank: what fits the base's width (docs/optimizers.md), 1 where the optimizer finds its own",
    ),
    lora_lr: float | None = Input(default=None, description="the same as learning_rate"),
    ti_lr: float | None = Input(
        default=None,
        description="peak learning rate of the trigger's vectors; blank: what fits the base's width (docs/optimizers.md), 1 where the optimizer finds its own",
    ),
    optimizer: str | None = Input(
        default=None,
        description="optimizer: one of torch's (adamw, adam, sgd, adafactor, muon ...), prodigy, which finds its own rate and takes lr 1, one of the extras (docs/optimizers.md); blank: adamw",
    ),
    batch_size: int | None = Input(default=None, ge=1, description="pictures in one forward and backward; blank: 4"),
    train_batch_size: int | None = Input(default=None, ge=1, description="the same as batch_size"),
    resolution: int | str | None = Input(
        default=None,
        description="pixels; side of the square whose area every bucket keeps, or several (512,768,1024): each picture trains at the largest that it fills without being enlarged, else at the smallest; blank: the base's own",
    ),
    lora_rank: int | None = Input(
        default=None, ge=1, le=1024, description="inner dimension of the low-rank update; blank: the preset's"
    ),
    base_model: str | None = Input(
        default=None,
        description="diffusers folder, hub id, or single-file .safetensors checkpoint to train on; blank: testbed/base",
    ),
    gradient_checkpointing: bool | None = Input(
        default=None,
        description="compute the denoiser's layers again in the backward pass: less memory, more time; blank: no",
    ),
    caption_dropout_rate: float | None = Input(
        default=None,
        ge=0.0,
        le=1.0,
        description="share of captions replaced by the empty one, which guidance relies on; blank: the preset's",
    ),
    seed: int | None = Input(
        default=None,
        ge=0,
        le=2147483647,
        description="seed of data order, noise, dropout and initial weights; blank: 0",
    ),
    checkpointing_steps: int | None = Input(default=None, ge=1, description="updates between checkpoints; blank: 100"),
    n_sample_imgs: int | None = Input(
        default=None,
        ge=1,
        le=64,
        description="pictures in a row; prompts are taken in turn, with other seeds; blank: one for each prompt",
    ),
    resume_from: Path | None = Input(
        default=None,
        description="go on with a run that was cancelled or killed: a tar of it, or the name under which this server kept it; it has its pictures and options",
    ),
    hf_repo_id: str | None = Input(
        default=None,
        regex="^[A-Za-z0-9._-]+/[A-Za-z0-9._-]+$",
        description="owner/name on the Hugging Face Hub that the files are pushed to as well; needs hf_token",
    ),
    hf_token: Secret | None = Input(default=None, description="token that may write to hf_repo_id; it is not kept"),
    args: str | None = Input(
        default=None,
        description='any other options: JSON such as {"optim": {"max_grad_norm": 0.5}}, or the URL of a JSON file',
    ),
    # </inputs>
) -> TrainingOutput:
    """Trains on the pictures. `weights` is a tar with the files for the clients; `hub` says where they were pushed."""
    inputs = dict(locals())
    console.hush_libraries(bars=False)  # before they are imported
    lean.start()
    from trainer import cog_door

    made = cog_door.train(inputs)
    return TrainingOutput(weights=Path(made.weights), hub=made.hub)
