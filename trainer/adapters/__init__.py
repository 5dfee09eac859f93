"""The adapters on a model's layers: name -> where the class is. Importing this imports no adapter."""

ADAPTERS: dict[str, str] = {
    "lora": "trainer.adapters.lora:LoRA",
    "dora": "trainer.adapters.dora:DoRA",
    "loha": "trainer.adapters.lycoris:LoHa",
    "lokr": "trainer.adapters.lycoris:LoKr",
    "oft": "trainer.adapters.oft:OFT",
    "full": "trainer.adapters.full:Full",
}
