"""What files say of themselves in their headers. No path, no user and no token goes in.

Keys are those that programs show: `modelspec.*` of Stability AI's Model Metadata Standard, `ss_*` of kohya's scripts,
which AUTOMATIC1111 and Forge read, and digests of the run under `tempera.*`.
"""

from __future__ import annotations

import base64
import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from trainer.args import TrainArgs
from trainer.export.likeness import Likeness, best
from trainer.export.names import base_name
from trainer.layouts import Modules, container
from trainer.types import ModelFamily
from trainer.updates import Difference, LohaTensors, LokrTensors, LoraTensors, Update

PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v"}  # as modelspec spells them; it has no word for others
TAGS = 500  # of each trigger at most, so that the header stays below the 1 MiB that ComfyUI shows
START_WORDS = "tempera.start_words"  # of an embedding
THUMBNAIL = 256  # pixels


@dataclass(frozen=True)
class Made:
    """What a run knows of itself beyond its args."""

    steps: int = 0  # updates that were done
    batch: int = 1  # pictures in one of them
    captions: Mapping[str, Sequence[str]] = field(default_factory=dict[str, Sequence[str]])  # by trigger
    buckets: Mapping[tuple[int, int], int] = field(default_factory=dict[tuple[int, int], int])  # size: pictures
    date: str = ""  # ISO 8601, when it was exported
    digests: Mapping[str, str] = field(default_factory=dict[str, str])  # of "args" and "dataset"
    samples: Mapping[float, Sequence[Path]] = field(default_factory=dict[float, Sequence[Path]])  # by strength
    likeness: Mapping[float, Likeness] = field(default_factory=dict[float, Likeness])  # of them, where it was measured

    @property
    def pictures(self) -> int:
        return sum(len(captions) for captions in self.captions.values())

    @property
    def strength(self) -> float:
        """The recommended one: that of the best likeness, else 1, with which everything was trained."""
        return best(self.likeness) if self.likeness else 1.0

    @property
    def sample(self) -> Path | None:
        """The first picture that was drawn after training, at the strength that is nearest to the recommended one."""
        nearest = min(self.samples, key=lambda strength: abs(strength - self.strength), default=None)
        return None if nearest is None else self.samples[nearest][0]


def of_layers(name: str, modules: Modules, family: ModelFamily, args: TrainArgs, made: Made) -> dict[str, str]:
    """Of a kohya or comfy file."""
    return _kept(
        args,
        minimal={
            **_model(name, family, args, kind="lora"),
            "ss_base_model_version": family.clients.base_version,
            **family.clients.facts,
            "ss_output_name": name,
            **_network(modules),
            "sshs_model_hash": "",
        },
        full={**_author(args, made), **_training(args, family, made)},
    )


def of_rows(name: str, trigger: str, family: ModelFamily, args: TrainArgs, made: Made) -> dict[str, str]:
    """Of an embedding, which stands for one trigger."""
    own = _model(name, family, args, kind="textual-inversion") | {"modelspec.trigger_phrase": trigger}
    return _kept(args, minimal={**own, **_start(args, trigger)}, full=_author(args, made))


def _start(args: TrainArgs, trigger: str) -> dict[str, str]:
    """The words that the trigger's vectors started from, where there were any: a weaker trigger is nearer to them."""
    own = [concept.init_words for concept in args.data.concepts.values() if concept.trigger == trigger]
    words = next((words for words in own if words), args.text.init_words)
    return {START_WORDS: words} if words and args.text.init != "random" else {}


def of_model(name: str, family: ModelFamily, args: TrainArgs, made: Made) -> dict[str, str]:
    """Of a whole checkpoint."""
    own = _model(name, family, args, kind="") | {"modelspec.implementation": "sgm"}
    return _kept(args, minimal=own, full={**_author(args, made), "modelspec.merged_from": base_name(args)})


def _kept(args: TrainArgs, *, minimal: Mapping[str, str], full: Mapping[str, str]) -> dict[str, str]:
    said = {"full": {**minimal, **full}, "minimal": dict(minimal), "none": dict[str, str]()}
    return said[args.export.metadata]


def _model(name: str, family: ModelFamily, args: TrainArgs, *, kind: str) -> dict[str, str]:
    """What programs need to tell what the file is. Hashes are filled in by `container`."""
    side = _side(args, family)
    prediction = PREDICTIONS.get(family.path.target)
    hashes = {key: "" for key in container.HASHES if key.startswith("modelspec.")}
    return {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{family.clients.architecture}{kind and f'/{kind}'}",
        "modelspec.implementation": "diffusers",
        "modelspec.title": name,
        "modelspec.resolution": f"{side}x{side}",
        **({"modelspec.prediction_type": prediction} if prediction else {}),
        "modelspec.trigger_phrase": ", ".join(args.data.triggers),
        **hashes,
    }


def _side(args: TrainArgs, family: ModelFamily) -> int:
    return max(args.data.resolution, default=family.resolution)


def _author(args: TrainArgs, made: Made) -> dict[str, str]:
    """Who, when, from what, and how it looks."""
    said = {
        "modelspec.author": args.export.author or "",
        "modelspec.date": made.date,
        "modelspec.thumbnail": thumbnail(made.sample) if args.export.thumbnail and made.sample else "",
        **{f"tempera.{what}_digest": digest for what, digest in made.digests.items()},
    }
    return {key: value for key, value in said.items() if value}


def thumbnail(picture: Path) -> str:
    """A JPEG of THUMBNAIL pixels at most as a data URL."""
    with Image.open(picture) as opened:
        small = opened.convert("RGB")
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    data = io.BytesIO()
    small.save(data, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}"


def _training(args: TrainArgs, family: ModelFamily, made: Made) -> dict[str, str]:
    side = _side(args, family)
    said = {"ss_sd_model_name": base_name(args), "ss_resolution": f"({side}, {side})"}
    if not made.pictures:
        return said
    sizes = {str(n): {"resolution": list(size), "count": made.buckets[size]} for n, size in enumerate(made.buckets)}
    return said | {
        "ss_steps": str(made.steps),
        "ss_epoch": str(made.steps * made.batch // made.pictures),
        "ss_total_batch_size": str(made.batch),
        "ss_num_train_images": str(made.pictures),
        "ss_bucket_info": json.dumps({"buckets": sizes}),
        "ss_dataset_dirs": json.dumps({t: {"n_repeats": 1, "img_count": len(c)} for t, c in made.captions.items()}),
        "ss_tag_frequency": json.dumps({trigger: tags(captions) for trigger, captions in made.captions.items()}),
    }


def tags(captions: Sequence[str]) -> dict[str, int]:
    """How often each part of a caption between commas occurs: the TAGS most frequent."""
    counts = Counter(tag.strip() for caption in captions for tag in caption.split(",") if tag.strip())
    return dict(counts.most_common(TAGS))


def _network(modules: Modules) -> dict[str, str]:
    """What kohya's file says of its network; Dynamic where modules differ."""
    network = next(iter({_kind(update): None for update in modules.values()}))
    ranks = {rank_and_alpha(update) for update in modules.values()}
    rank, alpha = ranks.pop() if len(ranks) == 1 else ("Dynamic", "Dynamic")
    facts = {"ss_network_module": "lycoris.kohya", "ss_network_args": json.dumps({"algo": network})}
    if network == "lora":
        facts = {"ss_network_module": "networks.lora"}
    return {**facts, "ss_network_dim": rank, "ss_network_alpha": alpha} if rank else facts


def _kind(update: Update) -> str:
    names = {LoraTensors: "lora", LohaTensors: "loha", LokrTensors: "lokr", Difference: "full"}
    return names[type(update)]


def rank_and_alpha(update: Update) -> tuple[str, str]:
    """As text; empty where the kind has none."""
    if isinstance(update, LoraTensors):
        return str(update.down.shape[0]), f"{update.alpha:g}"
    if isinstance(update, LohaTensors):
        return str(update.w1_b.shape[0]), f"{update.alpha:g}"
    return "", ""
