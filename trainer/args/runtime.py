"""The sections `sample` and `runtime`: sample grids, and the run itself."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from trainer import schedulers
from trainer.args.section import Section


class SampleArgs(Section):
    prompts: tuple[str, ...] = Field(
        (),
        description="prompts of the sample grid; {trigger} stands for the trigger [default: the first captions]",
    )
    pictures: int | None = Field(
        None,
        ge=1,
        le=64,
        description="pictures in a row; prompts are taken in turn, with other seeds [default: one for each prompt]",
    )
    every: int = Field(0, ge=0, description="updates between sample rows; 0 samples before and after only")
    steps: int = Field(25, ge=1, le=1000, description="denoising steps")
    guidance: float = Field(3.0, ge=0.0, le=100.0, description="classifier-free guidance scale")
    negative: str = Field("", description="what the pictures are guided away from [default: nothing]")
    scheduler: str | None = Field(
        None, description="ddim, euler, euler_a, dpm++_2m_karras, ...: see docs/sampling.md [default: the base's own]"
    )
    width: int | None = Field(None, ge=8, le=8192, description="pixels [default: the base's resolution]")
    height: int | None = Field(None, ge=8, le=8192, description="pixels [default: the base's resolution]")
    seed: int = Field(1234, ge=0, description="seed of the first picture; the next have the next seeds")
    strengths: tuple[float, ...] = Field((0.5, 1.0), description="adapter strengths of the last rows of the grid")

    @field_validator("scheduler")
    @classmethod
    def _is_known(cls, name: str | None) -> str | None:
        return None if name is None else schedulers.known(name)

    @model_validator(mode="after")
    def _guided_away(self) -> SampleArgs:
        if self.negative and self.guidance <= 1:
            raise ValueError(
                f"sample.negative is given, but sample.guidance is {self.guidance:g}: at 1 and below nothing is guided "
                "away from; raise it, or leave negative out"
            )
        return self


class RuntimeArgs(Section):
    name: str = Field(
        "run", pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,99}$", description="name of the run and of its export files"
    )
    out: str = Field("runs", description="folder the run directory is made in")
    seed: int = Field(0, ge=0, lt=2**31, description="seed of data order, noise, dropout and initial weights")
    steps: int | None = Field(None, ge=1, description="optimizer updates [default: 30 for each picture, 300 to 2000]")
    batch_size: int = Field(4, ge=1, description="pictures in one forward and backward")
    accumulate: int = Field(1, ge=1, description="forwards and backwards for one update")
    checkpoint_every: int = Field(100, ge=1, description="updates between checkpoints")
    keep_checkpoints: int = Field(2, ge=1, description="newest checkpoints kept; the rest are deleted")
    device: Literal["auto", "cpu", "cuda", "mps"] = Field(
        "auto", description="where to train; auto takes a GPU if there is one"
    )
    threads: int | None = Field(
        None, ge=1, description="CPU threads [default: torch's choice, and one for a small base]"
    )

    def updates(self, pictures: int) -> int:
        """The steps of a run on so many pictures."""
        return self.steps or min(2000, max(300, 30 * pictures))
