"""strip: the same tensors, bit by bit, without what the header says of who made them and from what."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import Tensor

from trainer.layouts import keys
from trainer.layouts.container import Opened, write
from trainer.progress import Progress
from trainer.tools.files import ALPHAS, ToolError

MEANING = (ALPHAS, "modelspec.prediction_type")  # without which the tensors mean something else


def strip(path: Path, out: Path, keep: Sequence[str] = ()) -> list[str]:
    """Writes the file without its metadata, but for `keep` and MEANING; a whole model keeps its format, too.

    Returns:
        The keys that are gone.

    Raises:
        LayoutError: the file is damaged.
        ToolError: a key to keep is not there.
    """
    file = Opened(path)
    if absent := sorted(set(keep) - file.metadata.keys()):
        raise ToolError(f"{path} says nothing under {', '.join(absent)}; it has {', '.join(sorted(file.metadata))}")
    model = () if all(keys.split(key) for key in file) else ("format",)  # transformers asks for it
    kept = {key: value for key, value in file.metadata.items() if key in (*MEANING, *model, *keep)}
    with Progress("stripping", len(file), "tensor") as progress:

        def tensors() -> Iterator[tuple[str, Tensor]]:
            for key in file:
                yield key, file.tensor(key)
                progress.advance()

        write(out, file.entries, tensors(), kept)
    return sorted(file.metadata.keys() - kept.keys())
