"""The model families: name -> where the class is. Importing this imports no model."""

FAMILIES: dict[str, str] = {
    "sd15": "trainer.models.sd15:SD15",
}
