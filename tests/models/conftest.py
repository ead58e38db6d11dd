"""Small networks of Stable Diffusion as folders, made of the names and shapes that torch gave."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

GOLDEN = Path(__file__).parent / "golden" / "stable_diffusion"
PARTS = {
    "unet": ("unet", "diffusion_pytorch_model.safetensors"),
    "vae": ("vae", "diffusion_pytorch_model.safetensors"),
    "clip": ("text_encoder", "model.safetensors"),
}


def filled(shapes: dict) -> dict:
    """As in tests/parity/test_stable_diffusion.py, which gave torch the same numbers."""
    random, tensors = np.random.RandomState(0), {}
    for name, shape in sorted(shapes.items()):
        scale = 0.3 if len(shape) == 1 else np.prod(shape[1:]) ** -0.5
        around = float(len(shape) == 1 and name.endswith(".weight"))
        tensors[name] = (around + scale * random.standard_normal(shape)).astype(np.float32)
    return tensors


@pytest.fixture
def pipeline(tmp_path):
    """Writes a golden network as a pipeline's folder; `change` may change its tensors."""

    def write(name: str, change=lambda tensors: tensors, **config) -> Path:
        described = json.loads((GOLDEN / f"{name}.json").read_text())
        part, file = PARTS[name.split("_")[0]]
        path = tmp_path / "pipeline" / part
        path.mkdir(parents=True, exist_ok=True)
        (path / "config.json").write_text(json.dumps(described["config"] | config))
        save_file(change(filled(described["tensors"])), path / file, metadata={"format": "pt"})
        return path.parent

    return write
