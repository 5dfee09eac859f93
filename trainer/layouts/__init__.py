"""How clients' files spell updates of layers: written, read back, added to the weights of a base."""

from trainer.layouts import container, embeddings
from trainer.layouts.container import LayoutError, Opened
from trainer.layouts.embeddings import is_embedding, read_embedding, triggers_of
from trainer.layouts.folders import peft_folders
from trainer.layouts.merge import Blend, Updates, check, merge
from trainer.layouts.read import files_of, read
from trainer.layouts.write import (
    Modules,
    by_rows,
    cannot_say,
    comfy_state,
    diffusers_metadata,
    diffusers_state,
    kohya_state,
)

__all__ = [
    "Blend",
    "LayoutError",
    "Modules",
    "Opened",
    "Updates",
    "by_rows",
    "cannot_say",
    "check",
    "comfy_state",
    "container",
    "diffusers_metadata",
    "diffusers_state",
    "embeddings",
    "files_of",
    "is_embedding",
    "kohya_state",
    "merge",
    "peft_folders",
    "read",
    "read_embedding",
    "triggers_of",
]
