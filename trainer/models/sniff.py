"""Which family a base is of: by the class and config of a diffusers folder, by tensor names of a single file."""

from __future__ import annotations

from trainer.args import ModelArgs
from trainer.models import load
from trainer.types import BaseModelError

AUTO = "auto"
TITLES = {"sd15": "Stable Diffusion 1.5", "sd2": "Stable Diffusion 2", "sdxl": "Stable Diffusion XL"}
LDM_UNET = "model.diffusion_model.input_blocks.0.0.weight"
# The text tower is what tells single files apart; the rest is what a whole checkpoint must have.
TOWERS = {
    "sdxl": "conditioner.embedders.1.model.",
    "sd2": "cond_stage_model.model.",
    "sd15": "cond_stage_model.transformer.",
}


def named(args: ModelArgs) -> ModelArgs:
    """The args with a family's name in place of `auto`.

    Raises:
        BaseModelError: the base is missing, damaged, or of no family.
    """
    return args.model_copy(update={"family": family_of(args)}) if args.family == AUTO else args


def check(args: ModelArgs, family: str) -> None:
    """Refuses a base of another family than `family`, saying what it is."""
    found = family_of(args)
    if found != family:
        raise BaseModelError(
            f"base {args.base!r} is {TITLES[found]}, and family {family} takes {TITLES[family]}; "
            f"set model.family to {found} or {AUTO}"
        )


def family_of(args: ModelArgs) -> str:
    """The name of the family that takes the base.

    Raises:
        BaseModelError: as `named`.
    """
    if load.is_single_file(args.base):
        return _of_keys(args.base, load.single_file_keys(args.base))
    pipeline = load.model_index(args.base, args.revision).get("_class_name")
    if pipeline == "StableDiffusionXLPipeline":
        return "sdxl"
    if pipeline == "StableDiffusionPipeline":
        unet = load.settings_of(args.base, "unet/config.json", args.revision)
        return "sd2" if unet.get("use_linear_projection") else "sd15"
    raise BaseModelError(
        f"base {args.base!r} is a {pipeline}; a StableDiffusionPipeline or StableDiffusionXLPipeline can be trained on"
    )


def _of_keys(base: str, keys: set[str]) -> str:
    """Tells a checkpoint by its tensors' names from what people give by mistake."""

    def has(prefix: str) -> bool:
        return any(key.startswith(prefix) for key in keys)

    if any("lora_" in key for key in keys):
        raise BaseModelError(f"base {base!r} is a LoRA, not a base model; give the checkpoint that it was trained on")
    if has("conditioner.embedders.0.model."):
        raise BaseModelError(f"base {base!r} is the SDXL refiner; give the SDXL base that it refines pictures of")
    family = next((name for name, tower in TOWERS.items() if has(tower)), None)
    absent = [part for part in (LDM_UNET, "first_stage_model.") if not has(part)]
    if family is None or absent:
        lacking = absent or ["cond_stage_model.", "conditioner."]
        raise BaseModelError(
            f"base {base!r} is no whole checkpoint of {', '.join(TITLES.values())}: "
            f"it has no {' or '.join(map(repr, lacking))} tensors"
        )
    return family
