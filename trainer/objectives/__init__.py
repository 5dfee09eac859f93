"""Objectives: each turns (predict, batch) into a Loss. Adding one is a file, and a line here."""

OBJECTIVES: dict[str, str] = {"denoise": "trainer.objectives.denoise:Denoise"}
