"""The model families: name -> where the class is. Importing this imports no model."""

FAMILIES: dict[str, str] = {
    "sd15": "trainer.models.sd15:SD15",
    "sd2": "trainer.models.sd2:SD2",
    "sdxl": "trainer.models.sdxl:SDXL",
}
