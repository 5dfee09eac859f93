"""Draws with trained weights: `python predict.py --weights RUN_OR_FILE --prompt ... --out DIR`, or as Cog's door.

Cog reads the signature of `Runner.run` without running this file, so its lines are literal.
"""

from __future__ import annotations

import sys

from cog import BaseRunner, Input, Path

from trainer.predict_door import Loaded, main


class Runner(BaseRunner):
    def setup(self, weights: Path | None = None) -> None:
        """`weights`: what training gave (Cog passes COG_WEIGHTS); a request may bring its own."""
        self.loaded = Loaded(str(weights) if weights else None)

    def run(
        self,
        prompt: str = Input(description="must name the trigger to show the concept"),
        negative_prompt: str = Input(default="", description="what the picture should be guided away from"),
        replicate_weights: Path | None = Input(
            default=None, description="tar or .safetensors from training; blank: the weights that the server has"
        ),
        lora_scale: float = Input(default=1.0, ge=-2.0, le=3.0, description="strength of the LoRA"),
        num_outputs: int = Input(default=1, ge=1, le=16, description="pictures"),
        num_inference_steps: int = Input(default=25, ge=1, le=1000, description="denoising steps"),
        guidance_scale: float = Input(default=3.0, ge=0.0, le=100.0, description="classifier-free guidance"),
        width: int | None = Input(default=None, ge=16, le=4096, description="pixels; blank: the base's own"),
        height: int | None = Input(default=None, ge=16, le=4096, description="pixels; blank: the base's own"),
        seed: int | None = Input(default=None, ge=0, description="of the first picture; blank: 0"),
    ) -> list[Path]:
        """PNG files, one for each picture."""
        inputs = {name: value for name, value in locals().items() if name != "self"}
        return [Path(path) for path in self.loaded.draw(inputs)]


if __name__ == "__main__":
    sys.exit(main())
