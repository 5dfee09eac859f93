"""Draws with trained weights: `python predict.py --weights RUN_OR_FILE --prompt ... --out DIR`, or as Cog's door.

Cog reads the signature of `Runner.run` without running this file, so its lines are literal.
"""

from __future__ import annotations

import sys

from trainer import console, lean
from trainer.predict_door import main

if __name__ == "__main__":  # from the command line, nothing of Cog is needed
    sys.exit(main())

from cog import BaseRunner, Input, Path


class Runner(BaseRunner):
    def setup(self, weights: Path | None = None) -> None:
        """`weights`: what training gave (Cog passes COG_WEIGHTS, a URL or a file); a request may bring its own."""
        console.hush_libraries(bars=False)  # before they are imported
        lean.start()
        from trainer import serve_door

        self.loaded = serve_door.Loaded(str(weights) if weights else None)

    def run(
        self,
        # <inputs> made by python -m trainer.cog_inputs --write
        prompt: str = Input(max_length=4000, description="what to draw; it must name the trigger to show the concept"),
        negative_prompt: str = Input(default="", max_length=4000, description="what the picture is guided away from"),
        replicate_weights: Path | None = Input(
            default=None,
            description="what a training gave, or another LoRA or embedding: tar, zip or .safetensors; blank: the weights that the server was started with, if any",
        ),
        lora_scale: float = Input(default=1.0, ge=-2.0, le=3.0, description="strength of the weights"),
        extra_lora: str | list[str] | None = Input(
            default=None, description="more weights beside those: a URL, or a list of URLs"
        ),
        extra_lora_scale: float | list[float] | None = Input(
            default=None, description="-2 to 3: the strength of extra_lora, or of each of them; blank: 1"
        ),
        image: Path | None = Input(default=None, description="picture to begin with"),
        mask: Path | None = Input(default=None, description="of the picture: white is drawn anew, black stays"),
        prompt_strength: float | None = Input(
            default=None,
            ge=0.01,
            le=1.0,
            description="how much of the picture is drawn anew; blank: 0.8, with a mask 1",
        ),
        width: int | None = Input(
            default=None, ge=16, le=2048, description="pixels; blank: the picture's, or the base's own"
        ),
        height: int | None = Input(
            default=None, ge=16, le=2048, description="pixels; blank: the picture's, or the base's own"
        ),
        num_outputs: int = Input(default=1, ge=1, le=8, description="pictures, with the next seeds"),
        scheduler: str | None = Input(
            default=None,
            choices=[
                "ddim",
                "ddpm",
                "pndm",
                "euler",
                "euler_karras",
                "euler_a",
                "heun",
                "heun_karras",
                "lms",
                "lms_karras",
                "dpm2",
                "dpm2_karras",
                "dpm2_a",
                "dpm2_a_karras",
                "dpm++_2m",
                "dpm++_2m_karras",
                "dpm++_2m_sde",
                "dpm++_2m_sde_karras",
                "unipc",
                "unipc_karras",
                "deis",
                "deis_karras",
                "lcm",
                "tcd",
            ],
            description="what samples; blank: the base's own",
        ),
        num_inference_steps: int = Input(default=25, ge=1, le=200, description="denoising steps"),
        guidance_scale: float = Input(default=3.0, ge=0.0, le=30.0, description="classifier-free guidance"),
        seed: int | None = Input(
            default=None, ge=0, le=2147483647, description="of the first picture; blank: any, which the log says"
        ),
        output_format: str = Input(default="png", choices=["png", "webp", "jpg"], description="of the files"),
        output_quality: int | None = Input(default=None, ge=1, le=100, description="of webp and jpg; blank: 90"),
        # </inputs>
    ) -> list[Path]:
        """Files in the order of their seeds."""
        inputs = {name: value for name, value in locals().items() if name != "self"}
        return [Path(path) for path in self.loaded.draw(inputs)]

    def healthcheck(self) -> bool:
        """Whether the device still answers."""
        return self.loaded.healthy()
