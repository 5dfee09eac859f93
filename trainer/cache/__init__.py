"""Latents, masks and text embeddings on disk, in shards that people recognise, found by what they depend on.

Everything is encoded one at a time, so that an entry does not depend on what it was encoded with.
"""

from trainer.cache.latents import cache_latents, cache_masks
from trainer.cache.text import TextCache

__all__ = ["TextCache", "cache_latents", "cache_masks"]
