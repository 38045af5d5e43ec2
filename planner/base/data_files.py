"""The data files that ship with the package: where they are, and reading one."""

from __future__ import annotations

import json
import os
from functools import lru_cache
from typing import Any

from planner.base.errors import InvalidInput


def data_path(*parts: str) -> str:
    """Return the path of a data file: beside the modules when installed, beside the package in a checkout."""
    return os.path.join(_data_folder(), *parts)


@lru_cache(maxsize=1)
def _data_folder() -> str:
    package = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    for folder in (os.path.join(package, "data"), os.path.join(os.path.dirname(package), "data")):
        if os.path.isfile(os.path.join(folder, "gpus.json")):
            return folder
    raise InvalidInput("the catalogue's data folder is missing from this installation; reinstall loraplan")


def _load(*parts: str) -> Any:
    with open(data_path(*parts), encoding="utf-8") as file:
        return json.load(file)
