"""The tensors of a Hugging Face folder: one safetensors file, or many with an index.

Reading goes tensor by tensor from the mapped file to its place on the devices, so the host never
holds the model; writing holds one file's tensors. Pickle files are refused, as opening one runs
what is inside.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxalign.core.state import paths
from jaxalign.core.types import Params, PyTree, UserError
from jaxalign.models.hub import Tensor

Rules = Sequence[tuple[str, PartitionSpec]]
# (abstract parameters, their family's rules) -> a sharding for each parameter.
Shardings = Callable[[PyTree, Rules], PyTree]
# Stored names -> the table for them, whose names may have another prefix from file to file.
Table = Callable[[Mapping[str, Any]], Sequence[Tensor]]


class Leaf(NamedTuple):
    """What one parameter has to become."""

    shape: tuple[int, ...]
    dtype: DTypeLike
    sharding: Any

    def __call__(self, array: np.ndarray) -> jax.Array:
        array = array.astype(self.dtype)
        if self.sharding is None or self.sharding.is_fully_addressable:
            return jax.device_put(array, self.sharding)
        # device_put would first compare the values of all processes.
        return jax.make_array_from_callback(self.shape, self.sharding, lambda index: array[index])


# --- reading -------------------------------------------------------------------------------------


def flat(params: Params) -> dict[str, jax.Array]:
    """Path to array."""
    return dict(zip(jax.tree.leaves(paths(params)), jax.tree.leaves(params), strict=True))


def places(
    abstract: PyTree, rules: Rules, dtype: DTypeLike, shardings: Shardings | None
) -> dict[str, Leaf]:
    """Path to its leaf's shape, dtype and place; without `shardings` the first device."""
    names, leaves = jax.tree.leaves(paths(abstract)), jax.tree.leaves(abstract)
    where = [None] * len(leaves)
    if shardings is not None:
        where = jax.tree.leaves(shardings(abstract, rules))
    return {
        name: Leaf(leaf.shape, dtype, place)
        for name, leaf, place in zip(names, leaves, where, strict=True)
    }


def read(
    path: Path,
    sources: Mapping[str, Path],
    table: Table,
    place: Mapping[str, Leaf],
    passed: Callable[[str], bool],
) -> Params:
    """The parameters of a table, each read, turned and placed alone.

    path: the folder, for the errors. sources: a tensor's name to its file.
    passed: says of a name that the table lacks whether it may be there.
    Raises: UserError that lists every tensor that is missing, unknown or of another shape.
    """
    with contextlib.ExitStack() as stack:
        files = {file: stack.enter_context(open_tensors(file)) for file in set(sources.values())}
        names = {file: set(tensors.keys()) for file, tensors in files.items()}
        opened = {name: files[file] for name, file in sources.items() if name in names[file]}
        fitting = table(opened)
        _check(path, fitting, place, opened, passed)
        params: Params = {}
        for tensor in fitting:
            *outer, last = tensor.path.split("/")
            inner = params
            for key in outer:
                inner = inner.setdefault(key, {})
            inner[last] = place[tensor.path](_part(tensor, opened[tensor.name]))
    return params


def _part(tensor: Tensor, file: Any) -> np.ndarray:
    """Our array out of theirs."""
    (i, parts), source = tensor.part, file.get_slice(tensor.name)
    step = source.get_shape()[-1] // parts
    array = source[..., i * step : (i + 1) * step]
    return np.moveaxis(array, (1, 0), (-2, -1)) if tensor.transposed else array


def _check(
    path: Path,
    table: Sequence[Tensor],
    place: Mapping[str, Leaf],
    opened: Mapping[str, Any],
    passed: Callable[[str], bool],
) -> None:
    """Raises one UserError that lists all tensors that are missing, unknown or of other shapes."""
    wanted = {tensor.name: _shape(tensor, place[tensor.path].shape) for tensor in table}
    shapes = {name: tuple(opened[name].get_slice(name).get_shape()) for name in opened}
    faults = [f"{name} {wanted[name]} is missing" for name in wanted if name not in shapes]
    faults += [
        f"{name} {shapes[name]} is unknown"
        for name in shapes
        if name not in wanted and not passed(name)
    ]
    faults += [
        f"{name} is {shapes[name]}, must be {shape}"
        for name, shape in wanted.items()
        if shapes.get(name, shape) != shape
    ]
    if faults:
        raise UserError(
            f"{path}: the tensors do not fit config.json: {'; '.join(sorted(faults))}; "
            "use the folder's own config.json and files"
        )


def _shape(tensor: Tensor, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of theirs for ours."""
    shape = (*shape[:-3:-1], *shape[:-2]) if tensor.transposed else shape
    return (*shape[:-1], shape[-1] * tensor.part[1])


def find(path: Path, stems: Sequence[str], writer: str) -> dict[str, Path]:
    """Tensor name to the file that holds it.

    stems: the files' name without ending, "model"; the first that is there counts. A stem with a
        variant, "model.fp16", has an index of the name that Hugging Face gives it.
    writer: the package whose save_pretrained writes such files, for the errors.
    Raises: UserError when there is none, or only pickle files.
    """
    for stem in stems:
        name, _, variant = stem.partition(".")
        index = path / ".".join(filter(None, [name, "safetensors.index", variant, "json"]))
        single = path / f"{stem}.safetensors"
        if index.exists():
            promised = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            return {name: path / file for name, file in promised.items()}
        if single.exists():
            with open_tensors(single) as file:
                return dict.fromkeys(file.keys(), single)
    first = f"{stems[0]}.safetensors"
    if any(path.glob("*.bin")) or any(path.glob("*.pt*")) or any(path.glob("*.ckpt")):
        raise UserError(
            f"{path}: only pickle files, which are never opened; write {first} from them "
            f"with save_pretrained of {writer}"
        )
    raise UserError(
        f"{path}: neither {first} nor {first}.index.json; give a Hugging Face model folder"
    )


@contextlib.contextmanager
def open_tensors(file: Path) -> Generator[Any]:
    """The tensors of a file, mapped and not read.

    Raises: UserError when it is not there or cut short.
    """
    try:
        opened = safe_open(file, framework="numpy")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file}: cannot be read ({error}); copy it again") from error
    with opened as tensors:
        yield tensors


# --- writing -------------------------------------------------------------------------------------


def write(
    path: Path,
    stem: str,
    table: Sequence[Tensor],
    leaves: Mapping[str, jax.Array],
    shard_bytes: int,
    dtype: DTypeLike | None = None,
) -> None:
    """Writes the tensors of a table into folder `path`, the inverse of `read`.

    stem: as in `find`. leaves: path to array, each addressable by this process.
    shard_bytes: files above this size are split, between tensors, with an index.
    dtype: of the tensors in the files; default: each array's own.
    """
    shards = _shards(table, leaves, shard_bytes, dtype)
    weight_map, total = {}, 0
    for i, shard in enumerate(shards, start=1):
        cut = "" if len(shards) == 1 else f"-{i:05d}-of-{len(shards):05d}"
        file = f"{stem}{cut}.safetensors"
        arrays = {name: _joined(tensors, leaves, dtype) for name, tensors in shard.items()}
        save_file(arrays, path / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(arrays, file)
        total += sum(array.nbytes for array in arrays.values())
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        text = json.dumps(index, indent=2) + "\n"
        (path / f"{stem}.safetensors.index.json").write_text(text, encoding="utf-8")


def _shards(
    table: Sequence[Tensor],
    leaves: Mapping[str, jax.Array],
    limit: int,
    dtype: DTypeLike | None,
) -> list[dict[str, list[Tensor]]]:
    """Their names, each with our parts of it, cut into files of at most `limit` bytes."""
    names: dict[str, list[Tensor]] = {}
    for tensor in table:
        names.setdefault(tensor.name, []).append(tensor)
    shards, filled = [{}], 0
    for name, tensors in names.items():
        arrays = [leaves[tensor.path] for tensor in tensors]
        size = sum(array.size * np.dtype(dtype or array.dtype).itemsize for array in arrays)
        if shards[-1] and filled + size > limit:
            shards.append({})
            filled = 0
        shards[-1][name] = tensors
        filled += size
    return shards


def _joined(
    tensors: Sequence[Tensor], leaves: Mapping[str, jax.Array], dtype: DTypeLike | None
) -> np.ndarray:
    """Theirs out of ours."""
    arrays = [np.asarray(leaves[tensor.path]) for tensor in tensors]
    if tensors[0].transposed:
        array = np.moveaxis(arrays[0], (-2, -1), (1, 0))
    else:
        array = np.concatenate(arrays, axis=-1)
    return np.ascontiguousarray(array, dtype)
