"""What a project with nano4M does around our classes: instantiate configurations, read checkpoints."""

import ast
import importlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load


def instantiate(config: dict[str, Any]) -> Any:
    """As hydra.utils.instantiate: call what ``_target_`` names with the rest."""
    module, _, name = config["_target_"].rpartition(".")
    arguments = {key: value for key, value in config.items() if key != "_target_"}
    return getattr(importlib.import_module(module), name)(**arguments)


def load_model_from_safetensors(path: Path) -> torch.nn.Module:
    """As nano4M's: the class and its arguments are the file's metadata, each value in Python's notation or text."""
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    config = {}
    for key, text in header["__metadata__"].items():
        try:
            config[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            config[key] = text
    model = instantiate(config)
    model.load_state_dict(load(content))
    return model.eval()


def resume(path: Path, model: torch.nn.Module) -> None:
    """As nano4M's training resumes the weights of a .pth."""
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=False)["model"])
