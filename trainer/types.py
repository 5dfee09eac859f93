"""The nouns that rooms pass to one another, and the protocols of the parts that plug in.

Shapes: B pictures, C latent channels, H W latent height and width, L tokens, D text width.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from trainer.path import NoisePath
from trainer.updates import Difference, Update


class BaseModelError(ValueError):
    """A base model that cannot be used. The message says what was given and what to do."""


@dataclass(frozen=True)
class Cond:
    """What the denoiser is conditioned on: hidden [B, L, D]; pooled [B, D'] where a family has it."""

    hidden: Tensor
    pooled: Tensor | None = None
    sizes: Tensor | None = None  # [B, 6], of Samples.sizes; encode leaves it out


@dataclass(frozen=True)
class Samples:
    """One micro-batch as the dataset gives it, before text is encoded."""

    latents: Tensor  # [B, C, H, W]
    captions: tuple[str, ...]  # dropout already applied
    names: tuple[str, ...]  # picture names, for messages
    mask: Tensor | None = None  # [B, 1, H, W] in 0..1
    prior: tuple[str, ...] = ()  # the captions with a class word for the trigger; empty when no prior is kept
    triggers: tuple[str, ...] = ()  # of each picture's concept, "" for none; empty where nobody asks
    weight: Tensor | None = None  # [B], factors of the loss
    sizes: Tensor | None = None  # [B, 6] pixels: original height, width, crop top, left, target height, width


Watch = Callable[[], AbstractContextManager[Callable[[], Tensor]]]  # of ModelFamily.attention_maps


@dataclass(frozen=True)
class Batch:
    """What an objective sees. All its randomness comes from `generator` (on the CPU)."""

    latents: Tensor  # [B, C, H, W]
    cond: Cond
    names: tuple[str, ...]
    generator: torch.Generator
    mask: Tensor | None = None  # [B, 1, H, W] in 0..1
    prior: Cond | None = None  # of Samples.prior
    base: Cond | None = (
        None  # for the frozen model: of prior, else of the captions; None: it reads what cond was made of
    )
    weight: Tensor | None = None  # [B], factors of the loss
    watch: Watch | None = None  # for the tokens of each picture's trigger; None: args ask for none
    probe: Probe | None = None  # None: nobody asks


class Probe(Protocol):
    """Who wants to see, or to change, what an objective does with one Batch. The objective goes on with what it gets.

    Where `batch.probe` is there, an objective calls each of these once, in this order, for the prediction that it
    compares with the pictures' target; not for the frozen model's, nor for those of a prior.
    """

    def timesteps(self, t: Tensor) -> Tensor:
        """[B] as drawn, on the CPU; before anything is computed from them."""
        ...

    def noise(self, eps: Tensor) -> Tensor:
        """[B, C, H, W] as drawn, on the latents' device; before pictures are mixed with it."""
        ...

    def prediction(self, pred: Tensor, xt: Tensor, t: Tensor, cond: Cond, target: Tensor) -> Tensor:
        """`pred` is what the model said of (xt, t, cond), [B, C, H, W] with gradients; what it should be: `target`."""
        ...


@dataclass(frozen=True)
class Loss:
    """`total` is differentiated; `terms` are logged (detached 0-d tensors: "raw" is the unweighted mean)."""

    total: Tensor
    terms: Mapping[str, Tensor]


@dataclass(frozen=True)
class Step:
    """What one optimizer update leaves behind; also one line of metrics.jsonl."""

    step: int  # 1-based count of finished updates
    images: int  # pictures seen in this update
    loss: float
    terms: Mapping[str, float]
    grad_norm: Mapping[str, float]  # by component, before clipping
    lr: Mapping[str, float]  # by component; for Prodigy the effective d * lr
    seconds: float
    extra: Mapping[str, float] = field(default_factory=dict)  # what hooks add


@dataclass(frozen=True)
class ClientNames:
    """How the programs that load our files spell the parts of a family."""

    base_version: str  # ss_base_model_version: "sd_v1"
    architecture: str  # modelspec.architecture, before its "/lora"
    diffusers: Callable[[str, str], str]  # (component, module path) -> "unet.<path>", key without suffix
    kohya: Callable[[str, str], str]  # (component, module path) -> "lora_unet_<path>", key without suffix
    embeddings: Mapping[str, str]  # text encoder -> key of its vectors: {"text_encoder": "emb_params"}
    facts: Mapping[str, str] = field(default_factory=dict[str, str])  # more metadata of a LoRA file: ss_v2
    comfy: Callable[[str, str], str] | None = None  # the same by the names of ComfyUI's modules, where they are known


Task = Literal["text", "image", "inpaint"]  # what a picture is made of: words, and another picture, and its mask
Predict = Callable[[Tensor, Tensor, Cond], Tensor]  # (xt [B,C,H,W], t [B] int64, cond) -> [B,C,H,W]


class ModelFamily(Protocol):
    """Loads itself, encodes, predicts. Draws no randomness, computes no loss, knows no adapter."""

    name: str  # "sd15"
    path: NoisePath
    denoiser: nn.Module
    vae: nn.Module
    text_encoders: dict[str, nn.Module]  # "text_encoder" -> CLIPTextModel
    tokenizers: dict[str, Any]  # the same keys
    resolution: int  # native side, pixels
    latent_scale: int  # pixels for one latent
    picture_step: int  # pixels; both sides of a drawn picture are multiples of it
    bucket_step: int  # pixels; both sides of a picture are multiples of it
    widths: Mapping[str, int]  # "denoiser": channels of its first level; "text": of the widest text encoder
    clients: ClientNames
    prompt_rules: list[Callable[[str], str]]  # applied in order to every prompt before the tokenizer
    clip_folders: Mapping[str, Path]  # text encoder -> folder of a CLIPModel that shares its tower

    def expand(self, prompt: str) -> str:
        """The prompt after every rule of `prompt_rules`, as the tokenizer gets it."""
        ...

    def encode(self, captions: Sequence[str]) -> Cond: ...
    def encode_images(self, pixels: Tensor) -> Tensor:
        """[B, 3, h, w] in -1..1 -> scaled posterior means [B, C, H, W]."""
        ...

    def token_places(self, captions: Sequence[str], words: Sequence[str]) -> Tensor:
        """[B, L] bool: which tokens of `encode`'s hidden states the word of each caption became; none for ""."""
        ...

    def attention_maps(self, places: Tensor, cell: int) -> AbstractContextManager[Callable[[], Tensor]]:
        """Inside, predictions are watched: what it gives, called after one, is where `places` [B, L] were looked at.

        That is [B, h, w], h = H / cell, with gradients: cross-attention's probabilities, added up over the places, mean
        over heads and the layers of that resolution. BaseModelError where there are none.
        """
        ...

    def predict(self, xt: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """What the network says at level t of `path`, which it is told as `path.time(t)`."""
        ...

    def pipeline(self, task: Task = "text", scheduler: str | None = None) -> Any:
        """A stock diffusers pipeline around the live modules, with a scheduler of `trainer.schedulers`.

        They must be `awake` when it draws.
        """
        ...

    def rest(self, names: Collection[str]) -> None:
        """Keeps these parts out of the device's memory until they are used; all others rest no longer."""
        ...

    def awake(self) -> AbstractContextManager[None]:
        """Inside, all parts are where a pipeline needs them."""
        ...

    def fingerprint(self, part: str) -> str:
        """Hex digest of the weights of `part` ("vae", "text_encoder", "denoiser"), for cache keys and env.json."""
        ...

    def quantise(self) -> None:
        """Holds the denoiser's frozen Linear weights in 8 bits from here on (model.quantise)."""
        ...


class Modular(Protocol):
    """What of a family says where its layers are and how programs name them."""

    denoiser: nn.Module
    text_encoders: dict[str, nn.Module]
    clients: ClientNames


@runtime_checkable
class HasSpellings(Protocol):
    """A family whose layers go by more names than its own clients' ones."""

    def spellings(self, component: str, path: str) -> Sequence[str]:
        """Every other name, without suffix, that a layer has in files of some program."""
        ...


class Adapter(Protocol):
    """Makes parameters trainable in a family, and can switch itself off."""

    component: str  # "adapter", "text" or "rows": which optimizer section is its own

    def attach(self, family: ModelFamily) -> list[tuple[str, nn.Parameter]]: ...
    def detach(self) -> None:
        """Leaves the family exactly as it was before attach."""
        ...

    def state_dict(self) -> dict[str, Tensor]: ...
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None: ...
    def disabled(self) -> AbstractContextManager[None]: ...
    def scaled(self, strength: float) -> AbstractContextManager[None]: ...
    def penalty(self) -> Tensor | None:
        """Regulariser added to the loss, or None."""
        ...


@runtime_checkable
class HasUpdates(Protocol):
    """An adapter that changes layers' weights."""

    def modules(self) -> Mapping[tuple[str, str], Update]:
        """(component, diffusers module path) -> what changed; component is "denoiser" or a text encoder's name."""
        ...

    def differences(self) -> Mapping[tuple[str, str], Difference]:
        """The same as differences of weights, for programs that cannot read it otherwise."""
        ...


@runtime_checkable
class HasCheckpoint(Protocol):
    """A family whose whole model can be written."""

    def tensors(self) -> Mapping[str, Mapping[str, Tensor]]:
        """By part ("denoiser", "vae", text encoders): the base's own tensors, whether or not an adapter is attached.

        Names are those of the modules, also where an adapter's layer stands in the place of one.
        """
        ...

    def single_file(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
        """What `tensors` gives, changed or not, under the names of the original code's checkpoints."""
        ...

    def folder(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> Mapping[str, Mapping[str, Tensor]]:
        """The same as the files of a diffusers folder: path in it -> tensors."""
        ...

    def save_settings(self, folder: Path) -> None:
        """Writes what a diffusers folder holds beside the tensors: configs, tokenizers, scheduler, model_index.json."""
        ...


@runtime_checkable
class HasRows(Protocol):
    """An adapter that learned token vectors."""

    triggers: tuple[str, ...]

    def rows(self, trigger: str | None = None) -> Mapping[str, Tensor]:
        """Text encoder's name -> [n, D]: of one trigger, or of all."""
        ...


@runtime_checkable
class HasScales(Protocol):
    """An adapter whose parameters learn at different multiples of the component's rate (LoRA+)."""

    def lr_scale(self, name: str) -> float:
        """Above 0: the factor for the parameter that `attach` gave under this name; 1 is the component's own rate."""
        ...


@runtime_checkable
class Draws(Protocol):
    """An adapter whose layers leave something out while they are trained."""

    def redraw(self, seed: int) -> None:
        """Draws what is left out until the next call, from `seed` alone; the loop gives one for each micro."""
        ...


class Objective(Protocol):
    def __call__(self, predict: Predict, batch: Batch) -> Loss: ...


class Hook(Protocol):
    """Watches a run, or acts in it: `trainer.events` has the events, and the base class is in trainer.hooks."""

    def on_start(self, run: Any) -> None: ...
    def on_step(self, run: Any, step: Step) -> None: ...
    def on_end(self, run: Any) -> None: ...


class Keeps(Protocol):
    """What has tensors that a checkpoint must hold, such as a hook. Its name is unique in a run, and fits a file."""

    @property
    def name(self) -> str: ...
    def state_dict(self) -> Mapping[str, Tensor]: ...
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None: ...


class Parameters(Protocol):
    def __call__(self) -> Iterable[nn.Parameter]: ...
