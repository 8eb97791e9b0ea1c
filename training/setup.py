"""With VLM2VLA_COMPILE=1 the reader of TFRecords is compiled by mypyc, from the same source; otherwise nothing is.

pip takes everything else from pyproject.toml.
"""

import os
from typing import Any

from setuptools import setup

COMPILED = os.environ.get("VLM2VLA_COMPILE") == "1"
MODULES = ("wire", "tfexample", "tfrecord", "rlds")


def extensions() -> list[Any]:
    """What a C compiler has to build; nothing while pip only asks what that needs."""
    try:
        from mypyc.build import mypycify
    except ImportError:
        return []
    paths = [f"src/vlm2vla_training/episodes/{name}.py" for name in MODULES]
    options = ["--follow-imports=silent", "--ignore-missing-imports"]
    return mypycify([*options, *paths], group_name="vlm2vla_training_reader")


setup(
    ext_modules=extensions() if COMPILED else [],
    setup_requires=["mypy[mypyc]>=1.18"] if COMPILED else [],
)
