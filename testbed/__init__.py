"""A tiny, really pretrained text-to-image base: its pictures, its recipe, its weights, its scorer."""
