"""The adapters on a denoiser: name -> where the class is. Importing this imports no adapter."""

ADAPTERS: dict[str, str] = {
    "lora": "trainer.adapters.lora:LoRA",
}
