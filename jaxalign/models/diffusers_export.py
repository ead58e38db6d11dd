"""A fine-tuned U-Net as a folder in diffusers' layout, the inverse of `diffusers_folders`.

A folder appears under its name when all of it is written: a kill leaves at most a folder of the
name with ".partial" behind, which the next writer removes.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Generator, Mapping
from pathlib import Path

import jax
from jax.typing import DTypeLike

from jaxalign.core.types import Params, UserError
from jaxalign.models import diffusers_folders, hub, unet, weights

STEM = diffusers_folders.STEMS[0]


def save_unet(
    source: Path | str,
    path: Path | str,
    params: Params,
    *,
    dtype: DTypeLike | None = None,
    shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes folder `path` with a unet/ alone, for `load_unet` and `from_pretrained(subfolder=)`.

    source: the pipeline's folder, or Hub name, that the U-Net came from.
    params: the U-Net's own; adapters are merged by `lora.effective` before. Every array must be
        addressable by this process, over as many devices as it likes.
    dtype: of the files; default: that of the parameters.
    shard_bytes: files above this size are split, between tensors, with an index; the host holds one
        file's tensors at a time.
    Raises: UserError for a folder that is not empty, and one that lists every parameter that is
        missing, unknown or of another shape than the source's U-Net has.
    """
    source = diffusers_folders.resolve(source)
    leaves = _fitting(source, params)
    with _appearing(Path(path)) as folder:
        _write_unet(source, folder, leaves, dtype, shard_bytes)


def save_folder(
    source: Path | str,
    path: Path | str,
    params: Params,
    *,
    dtype: DTypeLike | None = None,
    shard_bytes: int = 5_000_000_000,
) -> None:
    """The same for the whole pipeline, which `DiffusionPipeline.from_pretrained` opens.

    The parts that the source's model_index.json names are copied as they are, U-Net apart.
    """
    source = diffusers_folders.resolve(source)
    parts, leaves = _parts(source), _fitting(source, params)
    with _appearing(Path(path)) as folder:
        for part in parts:
            shutil.copytree(source / part, folder / part)
        shutil.copyfile(source / "model_index.json", folder / "model_index.json")
        _write_unet(source, folder, leaves, dtype, shard_bytes)


def _parts(source: Path) -> list[str]:
    """The other folders of a pipeline; one may name parts that it does not have."""
    try:
        named = json.loads((source / "model_index.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(
            f"{source}: no model_index.json can be read; give a pipeline's folder, or write the "
            "U-Net alone with save_unet"
        ) from error
    return [name for name in named if name != "unet" and (source / name).is_dir()]


def _fitting(source: Path, params: Params) -> dict[str, jax.Array]:
    """Path to array, of the shapes that the source's config.json gives."""
    config = diffusers_folders.read_unet_config(source)
    abstract = jax.eval_shape(unet.unet(config).init, jax.random.key(0))
    wanted, leaves = weights.flat(abstract), weights.flat(params)
    faults = [f"{p} {leaf.shape} is missing" for p, leaf in wanted.items() if p not in leaves]
    faults += [f"{p} {leaf.shape} is unknown" for p, leaf in leaves.items() if p not in wanted]
    faults += [
        f"{path} is {leaves[path].shape}, must be {leaf.shape}"
        for path, leaf in wanted.items()
        if path in leaves and leaves[path].shape != leaf.shape
    ]
    if faults:
        raise UserError(
            f"{source}: the parameters do not fit its unet/config.json: {'; '.join(faults)}; give "
            "those of its U-Net, adapters merged by lora.effective"
        )
    return leaves


def _write_unet(
    source: Path,
    folder: Path,
    leaves: Mapping[str, jax.Array],
    dtype: DTypeLike | None,
    shard_bytes: int,
) -> None:
    part = folder / "unet"
    part.mkdir()
    shutil.copyfile(source / "unet" / "config.json", part / "config.json")
    weights.write(part, STEM, hub.mirrored(leaves), leaves, shard_bytes, dtype)


@contextlib.contextmanager
def _appearing(path: Path) -> Generator[Path]:
    """A folder to write into, which takes the name `path` at the end."""
    path = path.absolute()
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise UserError(f"{path}: is there already and is not overwritten; choose another")
    partial = path.with_name(f"{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    partial.rename(path)
