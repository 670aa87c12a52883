"""Checkpoints in the Hugging Face layout, for tests."""

import json

import numpy as np
import safetensors.numpy


def write_checkpoint(directory, hf, tensors):
    """Writes config.json and model.safetensors."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(hf))
    contiguous = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
    safetensors.numpy.save_file(contiguous, directory / "model.safetensors")
