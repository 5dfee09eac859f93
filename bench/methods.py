"""The methods that bench.quality compares: options of train.py on top of the preset, by table and by name.

`--pictures N` is the bench's own: how many pictures teach, in place of 10; `{class}` stands for a word for the
concept's class (bench.runs.WORDS).

In a table each method differs from the first, its reference, in what its name says. Adapters are compared without token
rows, which would draw part of the concept for them; rates are those of the reference unless the name gives another.
"""

from __future__ import annotations

ALONE = ["--text.tokens", "0", "--optim.adapter.curve", "cosine"]  # the adapter learns everything
_PRODIGY = ["--optim.adapter.name", "prodigy", "--optim.adapter.lr", "1"]
PRODIGY_BOTH = [*_PRODIGY, "--optim.rows.name", "prodigy", "--optim.rows.lr", "1"]
HARD = ["--optim.adapter.curve", "hard_pivot", "--optim.rows.curve", "hard_pivot"]
PRIOR = ["--data.class_words", "star,heart,circle,square", "--objective.prior_weight", "1"]
HOT = ["--text.tokens", "0", "--optim.adapter.curve", "constant", "--optim.adapter.lr", "5e-3"]
SNR = ["--objective.min_snr_gamma", "5"]
LOW = ["--objective.levels.density", "linear", "--objective.levels.lean", "-1"]  # noise levels, the lowest oftenest
LONG = ["--runtime.steps", "1000"]
CHOSEN = ["--hooks.best.pictures", "4", "--runtime.checkpoint_every", "50"]


def _kind(name: str, *more: str) -> list[str]:
    return [*ALONE, "--adapter.kind", name, *more]


def _rate(lr: str) -> list[str]:
    return ["--optim.adapter.lr", lr]


TABLES: dict[str, dict[str, list[str]]] = {
    "quickstart": {
        "pivotal": [],
        "LoRA alone": ALONE,
        "textual inversion alone": ["--adapter.kind", "none", "--optim.rows.curve", "cosine"],
        "pivotal, prior kept": PRIOR,
    },
    "adapters": {
        "LoCon (LoRA on attention, ff and conv)": ALONE,
        "LoRA on attention": _kind("lora", "--adapter.targets", "attention"),
        "LoRA on attention and ff": _kind("lora", "--adapter.targets", "attention+ff"),
        "LoCon, rank 32": _kind("lora", "--adapter.rank", "32"),
        "rsLoRA, rank 32": _kind("lora", "--adapter.rank", "32", "--adapter.rank_stabilised"),
        "LoRA+ (B 16 times faster)": _kind("lora", "--adapter.lora_plus", "16", *_rate("2e-4")),
        "DoRA": _kind("dora"),
        "LoHa": _kind("loha"),
        "LoHa, rate 4e-3": _kind("loha", *_rate("4e-3")),
        "LoKr": _kind("lokr"),
        "LoKr, rate 4e-3": _kind("lokr", *_rate("4e-3")),
        "full, rate 1e-4": _kind("full", *_rate("1e-4")),
        "full, rate 3e-4": _kind("full", *_rate("3e-4")),
    },
    "rows": {
        "pivotal, adaptive, 2 tokens": [],
        "hard pivot": HARD,
        "no pivot (both cosine)": ["--optim.adapter.curve", "cosine", "--optim.rows.curve", "cosine"],
        "textual inversion alone": ["--adapter.kind", "none", "--optim.rows.curve", "cosine"],
        "1 token": ["--text.tokens", "1"],
        "4 tokens": ["--text.tokens", "4"],
        "start from words": ["--text.init", "words", "--text.init_words", "shape"],
        "start by similarity": ["--text.init", "similarity", "--text.init_words", "shape"],
    },
    "optimizers": {
        "AdamW, alone": ALONE,
        "Prodigy, alone": [*ALONE, *_PRODIGY],
        "AdamW, pivotal": [],
        "Prodigy, pivotal": PRODIGY_BOTH,
    },
    "objectives": {
        "plain": [],
        "min-SNR 5": SNR,
        "masked": ["--data.masks", "--data.mask.sources", "foreground"],
        "masked, prior outside": [
            *("--data.masks", "--data.mask.sources", "foreground"),
            *("--objective.mask_prior", "1"),
        ],
        "prior kept": PRIOR,
    },
    "budgets": {
        "300 steps": [],
        "100 steps": ["--runtime.steps", "100"],
        "1000 steps": LONG,
    },
    "fills": {  # which 300 steps do not teach: what would
        "1000 steps": LONG,
        "1000 steps, rank 32": [*LONG, "--adapter.rank", "32"],
        "1000 steps, rate 3e-3": [*LONG, *_rate("3e-3")],
        "1000 steps, full, rate 3e-4": [*LONG, "--adapter.kind", "full", *_rate("3e-4")],
        "1000 steps, low noise oftener": [*LONG, *LOW],
        "1000 steps, 40 pictures": [*LONG, "--pictures", "40"],
    },
    "pictures": {
        "10 pictures, 300 steps": [],
        "10 pictures, 100 steps": ["--runtime.steps", "100"],
        "4 pictures, 100 steps": ["--pictures", "4", "--runtime.steps", "100"],
        "4 pictures, 300 steps": ["--pictures", "4"],
        "25 pictures, 100 steps": ["--pictures", "25", "--runtime.steps", "100"],
        "25 pictures, 300 steps": ["--pictures", "25"],
    },
    "questions": {
        "pivotal": [],
        "LoRA alone": ALONE,
        "min-SNR 5": SNR,
        "no caption dropout": ["--data.caption_dropout", "0"],
        "offset noise 0.05": ["--objective.offset_noise", "0.05"],
        "condition noise 0.1": ["--objective.noise.condition", "0.1"],
        "rank 4": ["--adapter.rank", "4"],
        "rank 32": ["--adapter.rank", "32"],
        "attention and ff": ["--adapter.targets", "attention+ff"],
    },
    "parts": {  # those of `adapters`, `rows` and `optimizers` that are most asked about, for several concepts
        "pivotal": [],
        "DoRA": ["--adapter.kind", "dora"],
        "1 token": ["--text.tokens", "1"],
        "4 tokens": ["--text.tokens", "4"],
        "start from a word": ["--text.init", "words", "--text.init_words", "{class}"],
        "start by similarity": ["--text.init", "similarity", "--text.init_words", "{class}"],
        "hard pivot": HARD,
        "Prodigy": PRODIGY_BOTH,
    },
    "object": {  # of shapes
        "min-SNR, with convolutions": SNR,
        "min-SNR, attention and ff": [*SNR, "--adapter.targets", "attention+ff"],
        "min-SNR, with convolutions, rank 4": [*SNR, "--adapter.rank", "4"],
        "min-SNR, attention and ff, rank 16": [*SNR, "--adapter.targets", "attention+ff", "--adapter.rank", "16"],
    },
    "style": {
        "min-SNR, rank 8": SNR,
        "min-SNR, rank 4": [*SNR, "--adapter.rank", "4"],
        "min-SNR, rank 16": [*SNR, "--adapter.rank", "16"],
    },
    "checkpoint": {
        "the last": [],
        "the best of 6": CHOSEN,
    },
    "checkpoint of a hot run": {
        "the last": HOT,
        "the best of 6": [*HOT, *CHOSEN],
    },
    "captions": {
        "true captions": [],
        "captions by clip": [
            *("--data.recaption", "--data.captioner", "clip", "--data.caption_model.base", "testbed/base/clip"),
            *("--data.mode", "object", "--data.class_words", "shape"),
        ],
    },
    "savings": {
        "fp32 base": [],
        "bf16 base": ["--model.dtype", "bf16"],
        "int8 base": ["--model.quantise", "int8"],
        "bf16 and int8 base": ["--model.dtype", "bf16", "--model.quantise", "int8"],
        "gradient checkpointing": ["--model.gradient_checkpointing"],
    },
}
