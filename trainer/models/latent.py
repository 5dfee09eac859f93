"""What the families of latent diffusion share: CLIP towers, a VAE, a UNet with cross-attention, a noise path.

Shapes: B pictures, C latent channels, H W latent height and width, L tokens, D text width.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from trainer import schedulers
from trainer.args import ModelArgs
from trainer.models import original, parts, sniff, spelling
from trainer.models.attention import use_products, use_xformers
from trainer.models.attention_maps import watched
from trainer.models.clip_text import Tokens, fit, places
from trainer.models.compiled import compile_blocks
from trainer.models.packed import pack
from trainer.models.parts import Parts
from trainer.models.quantised import quantise
from trainer.models.resting import Resting
from trainer.models.weights import Weights
from trainer.path import NoisePath
from trainer.types import BaseModelError, ClientNames, Cond, Task

DIFFUSERS_STEP = 8  # pixels; its pipelines draw no other sides


class LatentFamily(ABC):
    """A frozen base. A family says what it is made of, and encodes prompts."""

    name: str  # of FAMILIES
    title: str  # as people know it
    pipelines: ClassVar[Mapping[Task, str]]  # what a picture is made of -> the class of diffusers that makes it
    towers: ClassVar[Mapping[str, Any]]  # text encoder -> class of transformers
    clients: ClientNames
    original_towers: ClassVar[Mapping[str, original.Tower]]  # text encoder -> its names in single files

    def __init__(
        self, base: Parts, *, prediction: str = "auto", clip_folders: Mapping[str, Path] | None = None
    ) -> None:
        self.path = _path(base.scheduler, prediction)
        self.denoiser: nn.Module = base.unet
        self.vae: nn.Module = base.vae
        self.text_encoders: dict[str, nn.Module] = dict(base.text_encoders)
        self.tokenizers: dict[str, Any] = dict(base.tokenizers)
        self.prompt_rules: list[Callable[[str], str]] = []
        self.clip_folders: Mapping[str, Path] = clip_folders or {}
        self._index, self._scheduler = base.index, base.scheduler
        self._vae: Any = base.vae
        self._unet: Any = base.unet
        self._check_parts()
        self._original = spelling.ldm_paths(self._unet.config)
        self.latent_scale = 2 ** (len(self._vae.config.block_out_channels) - 1)
        self.resolution = int(self._unet.config.sample_size) * self.latent_scale
        self.picture_step = math.lcm(DIFFUSERS_STEP, self.latent_scale)
        self.bucket_step = self.latent_scale * 2 ** (len(self._unet.config.block_out_channels) - 1)
        text: list[int] = [tower.config.hidden_size for tower in base.text_encoders.values()]
        self.widths = {"denoiser": int(self._unet.config.block_out_channels[0]), "text": max(text)}
        for module in (self.denoiser, self.vae, *self.text_encoders.values()):
            module.eval().requires_grad_(False)
        self._tokens = Tokens()
        modules = {"denoiser": self.denoiser, "vae": self.vae, **self.text_encoders}
        self._tensors = {name: module.state_dict(keep_vars=True) for name, module in modules.items()}
        self._resting = Resting(modules)
        self._own_tokenizers = dict(self.tokenizers)
        self._weights = self._remember_weights()

    @classmethod
    def load(cls, args: ModelArgs, device: torch.device) -> Self:
        """Reads the base that `args.base` names, in `args.dtype`, onto `device`.

        Raises:
            BaseModelError: it is missing, damaged, of another family, lacks a fitting tokenizer, or `args.attention`
                cannot be had here.
        """
        sniff.check(args, cls.name)
        base = parts.read(args, cls.pipelines["text"], cls.towers)
        for module in (*base.text_encoders.values(), base.vae, base.unet):
            module.to(device)
        folders = {name: Path(args.base) / name.replace("text_encoder", "clip") for name in cls.towers}
        clips = {name: folder for name, folder in folders.items() if folder.is_dir()}
        family = cls(base, prediction=args.prediction, clip_folders=clips)
        family.arrange(args, device)
        return family

    def arrange(self, args: ModelArgs, device: torch.device) -> None:
        """How the UNet computes what it computes: for memory or for speed, as `args` say and `device` can.

        Raises:
            BaseModelError: `device` cannot.
        """
        if args.gradient_checkpointing:
            self._unet.enable_gradient_checkpointing()
        if args.attention == "xformers":
            use_xformers(self._unet)
        elif args.attention == "auto" and args.dtype == "bf16" and device.type == "cpu":
            use_products(self._unet)
        pack(self._unet, args.packing, device)
        if args.compile == "blocks":
            compile_blocks(self._unet, device)

    def spellings(self, component: str, path: str) -> Sequence[str]:
        """Every name, without suffix, that a layer has in files of some program."""
        return spelling.others(component, path, self._original)

    def expand(self, prompt: str) -> str:
        """The prompt after every rule of `prompt_rules`, as the tokenizer gets it."""
        for rule in self.prompt_rules:
            prompt = rule(prompt)
        return prompt

    def encode(self, captions: Sequence[str]) -> Cond:
        """What the stock pipeline makes of the prompts, one row for each caption."""
        prompts = [self.expand(caption) for caption in captions]
        unique = list(dict.fromkeys(prompts))
        with self._resting.awake(*self.text_encoders):
            cond = self._encode(unique)
        if len(unique) == len(prompts):
            return cond
        place = {prompt: i for i, prompt in enumerate(unique)}
        rows = [place[prompt] for prompt in prompts]
        return Cond(cond.hidden[rows], None if cond.pooled is None else cond.pooled[rows])

    def token_places(self, captions: Sequence[str], words: Sequence[str]) -> Tensor:
        """[B, L] bool: which tokens of `encode`'s hidden states each caption's word became, in any of the towers.

        Args:
            words: one for each caption, before any rule; "" for none.
        """
        prompts, expanded = [self.expand(caption) for caption in captions], [self.expand(word) for word in words]
        each = [places(tokenizer, prompts, expanded) for tokenizer in self.tokenizers.values()]
        return torch.stack(each).any(0)

    def attention_maps(self, places: Tensor, cell: int) -> AbstractContextManager[Callable[[], Tensor]]:
        """See `trainer.models.attention_maps.watched`."""
        return watched(self._unet, places, cell)

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> Tensor:
        """[B, 3, h, w] in -1..1 -> scaled posterior means [B, C, H, W], float32."""
        with self._resting.awake("vae"), self._wide_vae():
            posterior = self._vae.encode(pixels.to(self._vae.device, self._vae.dtype)).latent_dist
        return posterior.mean.float() * self._vae.config.scaling_factor

    def predict(self, xt: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """What the UNet predicts (`path.target`) at [B, C, H, W], in xt's dtype."""
        dtype = self._unet.conv_in.weight.dtype  # as its `dtype`, which looks at every module each time
        added = self._added(xt, cond)
        pred: Tensor = self._unet(xt.to(dtype), t, cond.hidden.to(dtype), added_cond_kwargs=added, return_dict=False)[0]
        return pred.to(xt.dtype)

    def pipeline(self, task: Task = "text", scheduler: str | None = None) -> Any:
        """A stock diffusers pipeline around the live modules, which must be `awake` when it draws.

        Args:
            scheduler: of `trainer.schedulers` [default: the base's own].

        Raises:
            SchedulerError: it is unknown, or does not fit the base.
        """
        import diffusers  # a pipeline's import costs a second that training alone need not pay

        kind: Any = getattr(diffusers, self.pipelines[task])
        steps = schedulers.build(self._scheduler, self.path.target, scheduler)
        tokenizers = {parts.tokenizer_of(name): tokenizer for name, tokenizer in self.tokenizers.items()}
        pipe: Any = kind(
            vae=self._vae,
            unet=self._unet,
            scheduler=steps,
            **self.text_encoders,
            **tokenizers,
            **self._pipeline_options(),
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def rest(self, names: Collection[str]) -> None:
        """Keeps these parts ("vae", "denoiser", text encoders) out of the device's memory until they are used.

        What encodes wakes them itself; who takes a `pipeline` has them `awake`. What is not named rests no longer.
        """
        self._resting.rest(names)

    def awake(self) -> AbstractContextManager[None]:
        """Inside, all parts are where a pipeline needs them."""
        return self._resting.awake()

    def fingerprint(self, part: str) -> str:
        """Hex digest of weights and config of "vae", "denoiser" or a text encoder (with its tokenizer).

        It is that of the base as loaded, whether or not an adapter is attached.
        """
        return self._weights.digest(part)

    def quantise(self) -> None:
        """Holds the denoiser's Linear weights in 8 bits from here on; its fingerprint stays that of the base as loaded.

        Before an adapter is attached.
        """
        self._weights.digest("denoiser")  # which lets go of the weights
        del self._tensors["denoiser"]
        quantise(self.denoiser)

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """By part ("denoiser", "vae", text encoders): the base's own tensors, whether or not an adapter is attached.

        Raises:
            BaseModelError: the denoiser's are rounded.
        """
        if "denoiser" not in self._tensors:
            raise BaseModelError("the denoiser's weights are rounded (model.quantise), and no model is made of them")
        return {part: {name: t.detach() for name, t in own.items()} for part, own in self._tensors.items()}

    def single_file(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """What `tensors` gives under the names of the original code, with the marks of a v-prediction and of zero SNR.

        Clients tell what a checkpoint predicts by the empty tensors `v_pred` and `ztsnr`.
        """
        levels = len(self._vae.config.block_out_channels)
        named = original.unet(tensors["denoiser"], spelling.ldm_paths(self._unet.config))
        named |= original.vae(tensors["vae"], levels)
        for name, tower in self.original_towers.items():
            named |= tower(tensors[name])
        marks = {
            "v_pred": self.path.target == "v_prediction",
            "ztsnr": self._scheduler.config.get("rescale_betas_zero_snr", False),
        }
        return named | {mark: torch.zeros(0) for mark, on in marks.items() if on}

    def folder(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
        """The same as the files of a diffusers folder: path in it -> tensors."""
        files = {
            "unet/diffusion_pytorch_model.safetensors": dict(tensors["denoiser"]),
            "vae/diffusion_pytorch_model.safetensors": dict(tensors["vae"]),
        }
        for name in self.text_encoders:  # the older names, which all versions of transformers load
            own = {_tower_name(key): tensor for key, tensor in tensors[name].items()}
            files[f"{name}/model.safetensors"] = own
        return files

    def save_settings(self, folder: Path) -> None:
        """Writes what a diffusers folder holds beside the tensors: configs, tokenizers, scheduler, model_index.json."""
        pipe = self.pipeline()
        pipe.save_config(folder)
        pipe.scheduler.save_pretrained(folder / "scheduler")
        self._unet.save_config(folder / "unet")
        self._vae.save_config(folder / "vae")
        for name, encoder in self.text_encoders.items():
            tower: Any = encoder
            tower.config.save_pretrained(folder / name)
            self._own_tokenizers[name].save_pretrained(folder / parts.tokenizer_of(name))
        for file in folder.rglob("*.json"):
            parts.forget_paths(file)

    @abstractmethod
    def _encode(self, prompts: Sequence[str]) -> Cond:
        """One row for each prompt, after every rule."""

    def _added(self, xt: Tensor, cond: Cond) -> dict[str, Tensor] | None:
        """What the UNet is told beside the prompt's hidden states."""
        return None

    def _pipeline_options(self) -> dict[str, Any]:
        return {}

    def _ids(self, tower: str, prompts: Sequence[str]) -> Tensor:
        """[B, L] on the tower's device."""
        text: Any = self.text_encoders[tower]
        return self._tokens.ids(self.tokenizers[tower], prompts).to(text.device)

    @contextmanager
    def _wide_vae(self) -> Generator[None]:
        """Inside, a VAE whose config says force_upcast is in float32: SDXL's first one overflows in fp16."""
        narrow: torch.dtype = self._vae.dtype
        if narrow == torch.float32 or not self._vae.config.get("force_upcast"):
            yield
            return
        own = {name: parameter.data for name, parameter in self._vae.named_parameters()}
        nn.Module.to(self._vae, torch.float32)  # its own `to` warns each time, of nothing
        try:
            yield
        finally:
            for name, parameter in self._vae.named_parameters():
                parameter.data = own[name]

    def _check_parts(self) -> None:
        """Refuses parts that do not fit one another."""
        unet, vae = self._unet.config, self._vae.config
        for name, tokenizer in self.tokenizers.items():
            text: Any = self.text_encoders[name]
            fit(tokenizer, text.config)
        if unet.in_channels != vae.latent_channels:
            raise BaseModelError(
                f"the base's UNet takes {unet.in_channels} channels, its VAE gives {vae.latent_channels}; "
                "inpainting and upscaling bases cannot be trained on"
            )
        if vae.get("latents_mean") is not None or vae.get("latents_std") is not None:
            raise BaseModelError("the base's VAE shifts its latents (latents_mean), which no family here does")
        if not isinstance(unet.sample_size, int):
            raise BaseModelError(f"the base's UNet states no native size (sample_size is {unet.sample_size!r})")
        widths = [encoder.config.hidden_size for encoder in self._towers()]
        if unet.cross_attention_dim != sum(widths):
            given = " and ".join(map(str, widths))
            raise BaseModelError(
                f"the base's UNet wants text of width {unet.cross_attention_dim}, its text encoder gives {given}; "
                f"this is no {self.title}"
            )

    def _towers(self) -> list[Any]:
        return list(self.text_encoders.values())

    def _remember_weights(self) -> Weights:
        weights = Weights()
        weights.remember("vae", self._vae, self._vae.config)
        weights.remember("denoiser", self._unet, self._unet.config)
        for name, encoder in zip(self.text_encoders, self._towers(), strict=True):
            tokenizer: str = self.tokenizers[name].backend_tokenizer.to_str()
            weights.remember(name, encoder, encoder.config.to_dict(), tokenizer)
        return weights


def _tower_name(key: str) -> str:
    return key if key.startswith("text_projection.") else spelling.client_path(key)


def _path(scheduler: Any, prediction: str) -> NoisePath:
    if not hasattr(scheduler, "alphas_cumprod"):
        raise BaseModelError(
            f"the base's scheduler, {type(scheduler).__name__}, has no alphas_cumprod: its noise is no "
            "variance-preserving path, and no family here trains on another"
        )
    try:
        return NoisePath.from_scheduler(scheduler, prediction)
    except ValueError as error:
        raise BaseModelError(f"the base's scheduler cannot be used: {error}") from error
