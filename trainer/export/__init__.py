"""Trained tensors to the files that clients load, with a note for who gets them."""

from trainer.export.facts import Made
from trainer.export.files import ExportError, check, export
from trainer.export.likeness import Likeness, measure
from trainer.export.names import embedding_name, embedding_names

__all__ = ["ExportError", "Likeness", "Made", "check", "embedding_name", "embedding_names", "export", "measure"]
