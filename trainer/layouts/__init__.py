"""How clients' files spell updates of layers: written, read back, added to the weights of a base."""

from trainer.layouts.merge import Merged, merge
from trainer.layouts.read import LayoutError, file_of, is_plain_lora, read
from trainer.layouts.write import (
    Modules,
    diffusers_lacks,
    diffusers_metadata,
    diffusers_state,
    kohya_state,
)

__all__ = [
    "LayoutError",
    "Merged",
    "Modules",
    "diffusers_lacks",
    "diffusers_metadata",
    "diffusers_state",
    "file_of",
    "is_plain_lora",
    "kohya_state",
    "merge",
    "read",
]
