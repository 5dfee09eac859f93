"""python -m preprocess, with a line in $DECODES.<rank> for each picture that this rank decodes."""

from __future__ import annotations

import hashlib
import importlib
import os
import sys
from pathlib import Path
from typing import Any

from preprocess.__main__ import main

ingest: Any = importlib.import_module("preprocess.ingest")  # the package's `ingest` is the function
decode = ingest.decode


def counted(content: bytes, *more: Any) -> Any:
    with Path(f"{os.environ['DECODES']}.{os.environ['RANK']}").open("a") as file:
        file.write(hashlib.sha256(content).hexdigest() + "\n")
    return decode(content, *more)


ingest.decode = counted
sys.exit(main())
