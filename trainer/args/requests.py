"""What callers of Cog's doors send besides options of the tree. `trainer.cog_inputs` says which options they may."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, SecretStr

from trainer.args.section import Section


class TrainingRequest(Section):
    """What a training is asked for, beside options."""

    input_images: Path | None = Field(
        None,
        description="zip or tar of 2 pictures or more, usually 5 to 30, or a JSON list of URLs; x.txt beside x.png is "
        "its caption",
    )
    concept_mode: Literal["object", "style", "face"] | None = Field(
        None, description="what is learned: the preset that all other inputs change; blank: object"
    )
    autocaption: bool | None = Field(
        None, description="have captions written for pictures that come without one; by florence2, or by captioner"
    )
    mask_target_prompts: str | None = Field(
        None,
        min_length=1,
        description="learn only what fits these words (a red hat), found by the CLIPSeg model that args names as "
        "data.mask.base",
    )
    resume_from: Path | None = Field(
        None,
        description="go on with a run that was cancelled or killed: a tar of it, or the name under which this server "
        "kept it; it has its pictures and options",
    )
    hf_repo_id: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9._-]+/[A-Za-z0-9._-]+$",
        description="owner/name on the Hugging Face Hub that the files are pushed to as well; needs hf_token",
    )
    hf_token: SecretStr | None = Field(None, description="token that may write to hf_repo_id; it is not kept")
    args: str | None = Field(
        None,
        description='any other options: JSON such as {"optim": {"max_grad_norm": 0.5}}, or the URL of a JSON file',
    )
