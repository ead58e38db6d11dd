"""LoRA files of Stable Diffusion's U-Net: adapters written for diffusers, and read from what it and
others write (Hu et al. 2021).

Two matrices stand for each adapted one, both turned against ours: down `[rank, in]` and up
`[out, rank]`. `<m>` is a matrix's name in the checkpoint, `<a>` that of its attention layer, and
"unet." may be left out:

    peft        unet.<m>.lora_A.weight, .lora_B.weight: what PEFT calls them
    training    unet.<m>.lora.down.weight, .lora.up.weight: of diffusers' training scripts
    processor   unet.<a>.processor.to_q_lora.down.weight, .up.weight: diffusers without PEFT
    kohya       lora_unet_<m with _ for .>.lora_down.weight, .lora_up.weight, .alpha

The change of a matrix is scale * up @ down, where scale is alpha / rank: alpha from a tensor
`.alpha`, else from PEFT's settings in the file's header, else the rank. Ours has no scale: it is
multiplied into `up` in reading, and files written have no alpha, which readers take for scale 1.

Departures: matrices of the U-Net only; no text encoder, convolution, DoRA or Kronecker factors.

Dimensions: in, out of a matrix; r rank.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from jaxalign.core.types import Params, UserError
from jaxalign.models import hub, weights

# The projections of all attention layers, for `lora.init_lora`.
RULE = r".*attn[12]/to_(q|k|v|out_0)/kernel"
FILE = "pytorch_lora_weights.safetensors"
SETTINGS = "lora_adapter_metadata"  # the key of PEFT's settings in the header

Dialect = Literal["peft", "processor"]

PICKLES = (".bin", ".pt", ".pth", ".ckpt")
PROJECTION = re.compile(r"\.(to_[qkv]|to_out)(?:\.0)?$")
ENDINGS = {
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    ".down.weight": "down",
    ".up.weight": "up",
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".alpha": "alpha",
}


class Matrix(NamedTuple):
    """One of the U-Net's: our path, the checkpoint's name without ".weight", and (in, out)."""

    path: str
    name: str
    shape: tuple[int, ...]


class Found(NamedTuple):
    """A tensor of the file."""

    name: str
    array: np.ndarray


# --- writing -------------------------------------------------------------------------------------


def save(path: Path | str, adapters: Params, *, dialect: Dialect = "peft") -> None:
    """Writes `pytorch_lora_weights.safetensors` in folder `path`, which `load_lora_weights` opens.

    adapters: `{path: {"down": [in, r], "up": [r, out]}}`, as `lora.init_lora` makes them.
    dialect: "peft", or "processor" for programs of diffusers' time before PEFT.
    Raises: UserError for a folder that has such a file, matrices that do not fit each other, and
        ones that the dialect has no name for.
    """
    file = Path(path) / FILE
    if file.exists():
        raise UserError(f"{file}: is there already and is not overwritten; choose another folder")
    arrays: dict[str, np.ndarray] = {}
    for tensor in hub.mirrored(dict.fromkeys(adapters, 0)):
        down, up = (np.asarray(adapters[tensor.path][part]) for part in ("down", "up"))
        if not down.ndim == up.ndim == 2 or down.shape[1] != up.shape[0]:
            raise UserError(
                f"{tensor.path}: down {down.shape}, up {up.shape}: must be (in, rank) and "
                "(rank, out); make adapters with lora.init_lora"
            )
        first, second = _names(tensor.name.removesuffix(".weight"), dialect)
        arrays |= {first: np.ascontiguousarray(down.T), second: np.ascontiguousarray(up.T)}
    if not arrays:
        raise UserError(f"{file}: no adapters to write; make some with lora.init_lora")
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    save_file(arrays, partial, metadata={"format": "pt"})
    os.replace(partial, file)  # a kill leaves no half file of that name


def _names(matrix: str, dialect: Dialect) -> tuple[str, str]:
    """What a file calls down and up of a matrix."""
    if dialect == "peft":
        return f"unet.{matrix}.lora_A.weight", f"unet.{matrix}.lora_B.weight"
    if not PROJECTION.search(matrix):
        raise UserError(
            f"{matrix}: the processor dialect names projections of attention only; use "
            "dialect='peft'"
        )
    return f"unet.{_processor(matrix)}.down.weight", f"unet.{_processor(matrix)}.up.weight"


def _processor(matrix: str) -> str:
    """A projection's stem in that dialect: a.attn1.to_out.0 is a.attn1.processor.to_out_lora."""
    return PROJECTION.sub(r".processor.\1_lora", matrix)


# --- reading -------------------------------------------------------------------------------------


def load(path: Path | str, params: Params) -> Params:
    """The adapters in a file, f32, for `lora.effective({"model": params, "lora": adapters})`.

    path: the file, or a folder with a `pytorch_lora_weights.safetensors`.
    params: the U-Net's; shapes are enough (`jax.eval_shape`).
    Raises: UserError for pickle files, and one that lists every tensor that belongs to no matrix of
        this U-Net, is missing, or has another shape or rank than its partner.
    """
    file = _file(Path(path))
    with weights.open_tensors(file) as tensors:
        names = tensors.keys()
        stored = {name: tensors.get_tensor(name) for name in names}
        settings = _settings(tensors.metadata() or {})
    matrices = _matrices(params)
    found, faults = _sorted_out(stored, matrices)
    faults += [fault for path in found for fault in _misfits(matrices[path], found[path])]
    if faults or not found:
        raise UserError(
            f"{file}: does not fit this U-Net's matrices: {'; '.join(sorted(faults)) or 'empty'}; "
            "use a LoRA of the U-Net alone, made for this version of Stable Diffusion"
        )
    return {
        path: _adapter(matrix, found[path], settings)
        for path, matrix in matrices.items()
        if path in found
    }


def _file(path: Path) -> Path:
    """The safetensors file that `path` is or has."""
    file = path / FILE if path.is_dir() else path
    others = [] if file.exists() and path.is_dir() else [path, *sorted(path.glob("*"))]
    pickles = [other for other in others if other.suffix in PICKLES]
    if pickles:
        raise UserError(
            f"{pickles[0]}: pickle files are never opened; write {FILE} from it with "
            "save_lora_weights of diffusers"
        )
    return file


def _settings(header: Mapping[str, str]) -> dict[str, Any]:
    """PEFT's settings for the U-Net; none where the file has none."""
    values = json.loads(header.get(SETTINGS, "{}"))
    return {name.removeprefix("unet."): value for name, value in values.items()}


def _matrices(params: Params) -> dict[str, Matrix]:
    """Those of a U-Net, by our paths."""
    leaves = jax.tree.leaves(params)
    return {
        tensor.path: Matrix(tensor.path, tensor.name.removesuffix(".weight"), tuple(leaf.shape))
        for tensor, leaf in zip(hub.mirrored(params), leaves, strict=True)
        if tensor.transposed and leaf.ndim == 2
    }


def _aliases(name: str, layers: int) -> Iterator[str]:
    """What a matrix is called in the dialects; layers: residual blocks a level on the way down."""
    for matrix in (name, _processor(name)):
        yield from (matrix, f"unet.{matrix}")
    yield "lora_unet_" + name.replace(".", "_")
    yield "lora_unet_" + _original(name, layers).replace(".", "_")


def _original(name: str, layers: int) -> str:
    """The name in the network as first released, whose blocks are counted through all levels.

    The dialect kohya has it in files of SDXL.
    """

    def renamed(found: re.Match) -> str:
        if found["way"] == "mid":
            return "middle_block.1."
        block = int(found["level"]) * (layers + 1) + int(found["layer"])
        return (
            f"input_blocks.{block + 1}.1."
            if found["way"] == "down"
            else f"output_blocks.{block}.1."
        )

    pattern = r"^(?P<way>down|mid|up)_blocks?\.(?:(?P<level>\d+)\.)?attentions\.(?P<layer>\d+)\."
    return re.sub(pattern, renamed, name)


def _sorted_out(
    stored: Mapping[str, np.ndarray], matrices: Mapping[str, Matrix]
) -> tuple[dict[str, dict[str, Found]], list[str]]:
    """Our path to its parts ("down", "up", "alpha"), and what is wrong with the names."""
    layers = len({m.split("/")[1] for m in matrices if m.startswith("down_blocks_0/resnets_")})
    homes = {alias: m.path for m in matrices.values() for alias in _aliases(m.name, layers)}
    found: dict[str, dict[str, Found]] = {}
    faults = []
    for name, array in stored.items():
        path, part = _home(name, homes)
        if not path:
            faults.append(f"{name} {array.shape} is unknown")
        elif part in found.setdefault(path, {}):
            faults.append(f"{name} and {found[path][part].name} are the same matrix")
        else:
            found[path][part] = Found(name, array)
    return found, faults


def _home(name: str, homes: Mapping[str, str]) -> tuple[str, str]:
    """The path and part of a stored tensor; empty where it belongs nowhere."""
    for ending, part in ENDINGS.items():
        if name.endswith(ending) and name.removesuffix(ending) in homes:
            return homes[name.removesuffix(ending)], part
    return "", ""


def _misfits(matrix: Matrix, parts: Mapping[str, Found]) -> list[str]:
    """What is wrong with the tensors of one matrix."""
    (size, out), missing = matrix.shape, [p for p in ("down", "up") if p not in parts]
    wanted = {"down": f"(rank, {size})", "up": f"({out}, rank)"}
    if missing:
        return [f"{matrix.name}: {part} {wanted[part]} is missing" for part in missing]
    down, up, alpha = parts["down"], parts["up"], parts.get("alpha")
    faults = []
    if down.array.ndim != 2 or down.array.shape[1] != size:
        faults.append(f"{down.name} is {down.array.shape}, must be {wanted['down']}")
    if up.array.ndim != 2 or up.array.shape[0] != out:
        faults.append(f"{up.name} is {up.array.shape}, must be {wanted['up']}")
    if not faults and down.array.shape[0] != up.array.shape[1]:
        faults.append(
            f"{down.name} {down.array.shape} and {up.name} {up.array.shape} differ in rank"
        )
    if alpha and alpha.array.size != 1:
        faults.append(f"{alpha.name} is {alpha.array.shape}, must be ()")
    return faults


def _adapter(matrix: Matrix, parts: Mapping[str, Found], settings: Mapping[str, Any]) -> Params:
    """Ours out of theirs, with the scale in `up`."""
    down, up = (parts[part].array.astype(np.float32).T for part in ("down", "up"))
    rank = down.shape[1]
    scale = _peft_scale(matrix.name, rank, settings)
    if "alpha" in parts:
        scale = parts["alpha"].array.item() / rank
    return {"down": jnp.asarray(down), "up": jnp.asarray(up * np.float32(scale))}


def _peft_scale(name: str, rank: int, settings: Mapping[str, Any]) -> float:
    """alpha / rank by PEFT's settings, where a pattern that ends a matrix's name has its own."""
    alpha = settings.get("lora_alpha", rank)
    for pattern, value in settings.get("alpha_pattern", {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            alpha = value
            break
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
