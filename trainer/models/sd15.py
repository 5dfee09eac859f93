"""The Stable Diffusion 1.5 family: one CLIP text tower, a 4-channel VAE, a UNet with cross-attention.

Shapes: B pictures, C latent channels, H W latent height and width, L tokens, D text width.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, SchedulerMixin, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from trainer.args import ModelArgs
from trainer.models import load
from trainer.path import NoisePath
from trainer.types import BaseModelError, ClientNames, Cond

log = logging.getLogger(__name__)

LDM_UNET = "model.diffusion_model.input_blocks.0.0.weight"
KOHYA_PREFIXES = {"denoiser": "lora_unet", "text_encoder": "lora_te"}
DIFFUSERS_PREFIXES = {"denoiser": "unet", "text_encoder": "text_encoder"}


def client_path(component: str, path: str) -> str:
    """transformers 5 dropped the `text_model` level of a CLIP tower, which every client expects in a name."""
    return f"text_model.{path}" if component == "text_encoder" and not path.startswith("text_model.") else path


def kohya_name(component: str, path: str) -> str:
    """`down_blocks.0.attentions.0...` -> `lora_unet_down_blocks_0_attentions_0_...`, as kohya spells SD1.5."""
    return f"{KOHYA_PREFIXES[component]}_{client_path(component, path)}".replace(".", "_")


def diffusers_name(component: str, path: str) -> str:
    """`down_blocks.0.attentions.0...` -> `unet.down_blocks.0.attentions.0...`."""
    return f"{DIFFUSERS_PREFIXES[component]}.{client_path(component, path)}"


CLIENTS = ClientNames(
    base_version="sd_v1",
    architecture="stable-diffusion-v1",
    diffusers=diffusers_name,
    kohya=kohya_name,
    embeddings={"text_encoder": "emb_params"},
)


class SD15:
    """Frozen Stable Diffusion 1.5: loads itself, encodes, predicts."""

    name = "sd15"
    clients = CLIENTS

    def __init__(
        self,
        tokenizer: Any,
        text_encoder: nn.Module,
        vae: nn.Module,
        unet: nn.Module,
        scheduler: Any,
        *,
        prediction: str = "auto",
        clip_folder: Path | None = None,
    ) -> None:
        self.path = NoisePath.from_scheduler(scheduler, prediction)
        self.denoiser = unet
        self.vae = vae
        self.text_encoders: dict[str, nn.Module] = {"text_encoder": text_encoder}
        self.tokenizers: dict[str, Any] = {"text_encoder": tokenizer}
        self.prompt_rules: list[Callable[[str], str]] = []
        self.clip_folders: Mapping[str, Path] = {"text_encoder": clip_folder} if clip_folder else {}
        self._scheduler = scheduler
        self._text: Any = text_encoder
        self._vae: Any = vae
        self._unet: Any = unet
        self._check_parts()
        self.latent_scale = 2 ** (len(self._vae.config.block_out_channels) - 1)
        self.resolution = int(self._unet.config.sample_size) * self.latent_scale
        self.bucket_step = self.latent_scale * 2 ** (len(self._unet.config.block_out_channels) - 1)
        for module in (unet, vae, text_encoder):
            module.eval().requires_grad_(False)
        self._too_long: set[str] = set()
        self._digests: dict[str, str] = {}
        self._weights = self._remember_weights()

    @classmethod
    def load(cls, args: ModelArgs, device: torch.device) -> SD15:
        """Reads the base that `args.base` names, in `args.dtype`, onto `device`.

        Raises:
            BaseModelError: it is missing, damaged, no Stable Diffusion 1.5, or lacks a fitting tokenizer.
        """
        dtype = load.DTYPES[args.dtype]
        parts = (_single_file_parts if load.is_single_file(args.base) else _folder_parts)(args, dtype)
        for key in ("text_encoder", "vae", "unet"):
            parts[key].to(device)
        clip = Path(args.base) / "clip"
        return cls(**parts, prediction=args.prediction, clip_folder=clip if clip.is_dir() else None)

    def expand(self, prompt: str) -> str:
        """The prompt after every rule of `prompt_rules`, as the tokenizer gets it."""
        for rule in self.prompt_rules:
            prompt = rule(prompt)
        return prompt

    def encode(self, captions: Sequence[str]) -> Cond:
        """Last hidden states [B, L, D] of the text tower, as the stock pipeline computes them."""
        prompts = [self.expand(caption) for caption in captions]
        unique = list(dict.fromkeys(prompts))
        ids = self._token_ids(unique)
        hidden: Tensor = self._text(ids.to(self._text.device))[0]
        if len(unique) < len(prompts):
            place = {prompt: i for i, prompt in enumerate(unique)}
            hidden = hidden[[place[prompt] for prompt in prompts]]
        return Cond(hidden)

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> Tensor:
        """[B, 3, h, w] in -1..1 -> scaled posterior means [B, C, H, W], float32."""
        posterior = self._vae.encode(pixels.to(self._vae.device, self._vae.dtype)).latent_dist
        return posterior.mean.float() * self._vae.config.scaling_factor

    def predict(self, xt: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """What the UNet predicts (`path.target`) at [B, C, H, W], in xt's dtype."""
        dtype = self._unet.dtype
        pred: Tensor = self._unet(xt.to(dtype), t, cond.hidden.to(dtype), return_dict=False)[0]
        return pred.to(xt.dtype)

    def pipeline(self) -> Any:
        """A stock StableDiffusionPipeline around the live modules, with the base's own sampler."""
        from diffusers import StableDiffusionPipeline  # its import costs a second that training alone need not pay

        scheduler: Any = type(self._scheduler).from_config(self._scheduler.config, prediction_type=self.path.target)
        pipe: Any = StableDiffusionPipeline(
            vae=self._vae,
            text_encoder=self._text,
            tokenizer=self.tokenizers["text_encoder"],
            unet=self._unet,
            scheduler=scheduler,
            safety_checker=None,  # pyright: ignore[reportArgumentType]
            feature_extractor=None,  # pyright: ignore[reportArgumentType]
            requires_safety_checker=False,
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def fingerprint(self, part: str) -> str:
        """Hex digest of weights and config of "vae", "text_encoder" (with its tokenizer) or "denoiser".

        It is that of the base as loaded, whether or not an adapter is attached.
        """
        if part not in self._digests:
            tensors, config = self._weights[part]
            digest = hashlib.sha256(config.encode())
            for name, tensor in sorted(tensors.items()):
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
            self._digests[part] = digest.hexdigest()
        return self._digests[part]

    def _token_ids(self, prompts: Sequence[str]) -> Tensor:
        """[B, L] padded to the tokenizer's length; a prompt that is cut is named once in the log."""
        tokenizer = self.tokenizers["text_encoder"]
        length: int = tokenizer.model_max_length
        rows: list[list[int]] = tokenizer(list(prompts)).input_ids
        for i, row in enumerate(rows):
            if len(row) > length:
                rows[i] = [*row[: length - 1], row[-1]]
                if prompts[i] not in self._too_long:
                    self._too_long.add(prompts[i])
                    log.warning("only the first %d of %d tokens count in: %s", length, len(row), prompts[i])
            else:
                rows[i] = row + [tokenizer.pad_token_id] * (length - len(row))
        return torch.tensor(rows)

    def _check_parts(self) -> None:
        """Refuses parts that do not fit one another; a missing tokenizer, say, loads as junk without an error."""
        tokenizer = self.tokenizers["text_encoder"]
        text, unet, vae = self._text.config, self._unet.config, self._vae.config
        if len(tokenizer) != text.vocab_size:
            raise BaseModelError(
                f"the base's tokenizer has {len(tokenizer)} tokens and its text encoder {text.vocab_size}; "
                "is the tokenizer folder missing or from another model?"
            )
        if unet.cross_attention_dim != text.hidden_size or unet.addition_embed_type is not None:
            raise BaseModelError(
                f"the base's UNet wants text of width {unet.cross_attention_dim}, its text encoder gives "
                f"{text.hidden_size}; this is no Stable Diffusion 1.5"
            )
        if unet.in_channels != vae.latent_channels:
            raise BaseModelError(
                f"the base's UNet takes {unet.in_channels} channels, its VAE gives {vae.latent_channels}; "
                "inpainting and upscaling bases cannot be trained on"
            )
        if not isinstance(unet.sample_size, int):
            raise BaseModelError(f"the base's UNet states no native size (sample_size is {unet.sample_size!r})")
        tokenizer.model_max_length = min(tokenizer.model_max_length, text.max_position_embeddings)

    def _remember_weights(self) -> dict[str, tuple[dict[str, Tensor], str]]:
        """The base's own tensors by part, before any adapter renames or joins them. Nothing is copied."""
        tokenizer: str = self.tokenizers["text_encoder"].backend_tokenizer.to_str()
        return {
            "vae": (self._vae.state_dict(), _config_text(self._vae.config)),
            "denoiser": (self._unet.state_dict(), _config_text(self._unet.config)),
            "text_encoder": (self._text.state_dict(), _config_text(self._text.config.to_dict()) + tokenizer),
        }


def _config_text(config: Mapping[str, Any]) -> str:
    """The config without what differs between copies of one model: paths and library versions."""
    kept = {k: v for k, v in config.items() if not k.startswith("_") and k not in ("transformers_version", "dtype")}
    return json.dumps(kept, sort_keys=True, default=str)


def _folder_parts(args: ModelArgs, dtype: torch.dtype) -> dict[str, Any]:
    base, revision = args.base, args.revision
    index = load.model_index(base, revision)
    pipeline = index.get("_class_name")
    if pipeline != "StableDiffusionPipeline":
        raise BaseModelError(f"base {base!r} is a {pipeline}; family sd15 takes a StableDiffusionPipeline")
    scheduler_class: str = index["scheduler"][1]
    return {
        "tokenizer": load.settings(CLIPTokenizer, base, "tokenizer", revision),
        "text_encoder": load.part(CLIPTextModel, base, "text_encoder", revision, dtype),
        "vae": load.part(AutoencoderKL, base, "vae", revision, dtype),
        "unet": load.part(UNet2DConditionModel, base, "unet", revision, dtype),
        "scheduler": load.settings(_scheduler_class(base, scheduler_class), base, "scheduler", revision),
    }


def _scheduler_class(base: str, name: str) -> Any:
    import diffusers

    kind: Any = getattr(diffusers, name, None)
    if not (isinstance(kind, type) and issubclass(kind, SchedulerMixin)):
        raise BaseModelError(f"base {base!r} names the scheduler {name!r}, which diffusers does not have")
    return kind


def _single_file_parts(args: ModelArgs, dtype: torch.dtype) -> dict[str, Any]:
    from diffusers import StableDiffusionPipeline

    _check_single_file(args.base, load.single_file_keys(args.base))
    reader: Any = StableDiffusionPipeline.from_single_file
    try:
        pipe = reader(args.base, config=args.config, dtype=dtype, safety_checker=None)
    except load.LOAD_ERRORS as error:
        hint = f"does model.config {args.config!r} fit it?" if args.config else "set model.config to a diffusers folder"
        raise BaseModelError(
            f"base {args.base!r} cannot be read ({load.first_line(error)}); a single file holds neither configs "
            f"nor tokenizer: {hint}"
        ) from error
    return {key: getattr(pipe, key) for key in ("tokenizer", "text_encoder", "vae", "unet", "scheduler")}


def _check_single_file(base: str, keys: set[str]) -> None:
    """Tells a Stable Diffusion 1.5 checkpoint by its tensors' names from what people give by mistake."""
    if any("lora_" in key for key in keys):
        raise BaseModelError(f"base {base!r} is a LoRA, not a base model; give the checkpoint that it was trained on")
    if any(key.startswith("conditioner.embedders.") for key in keys):
        raise BaseModelError(f"base {base!r} is an SDXL checkpoint; family sd15 takes Stable Diffusion 1.5")
    if any(key.startswith("cond_stage_model.model.") for key in keys):
        raise BaseModelError(f"base {base!r} is a Stable Diffusion 2 checkpoint; family sd15 takes 1.5")
    parts = (LDM_UNET, "first_stage_model.", "cond_stage_model.transformer.")
    absent = [part for part in parts if not any(key.startswith(part) for key in keys)]
    if absent:
        raise BaseModelError(f"base {base!r} is no Stable Diffusion 1.5 checkpoint: it has no {absent[0]!r} tensors")
