"""Meshes, shardings and their messages, on eight virtual devices."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxalign.core import mesh as meshes
from jaxalign.core.types import UserError


def test_parse_mesh():
    assert meshes.parse_mesh("data=-1,fsdp=2") == {"data": -1, "fsdp": 2}
    assert meshes.parse_mesh(" data = 8 ") == {"data": 8}


@pytest.mark.parametrize(
    "text",
    ["", "data", "data=", "data=x", "data=2;fsdp=2", "data=0", "data=-2", "a=-1,b=-1", "a=2,a=4"],
)
def test_parse_mesh_refuses(text):
    with pytest.raises(UserError, match="mesh"):
        meshes.parse_mesh(text)


def test_make_mesh_fills_in_and_is_auto():
    mesh = meshes.make_mesh({"data": -1, "fsdp": 2})
    assert dict(mesh.shape) == {"data": 4, "fsdp": 2}
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert dict(meshes.make_mesh().shape) == {"data": 8}
    assert dict(meshes.make_mesh({"data": 2}, jax.devices()[:2]).shape) == {"data": 2}


@pytest.mark.parametrize("sizes", [{"data": 3}, {"data": 16}, {"data": -1, "fsdp": 3}, {"data": 4}])
def test_make_mesh_refuses_what_does_not_multiply(sizes):
    with pytest.raises(UserError, match="number of devices, 8"):
        meshes.make_mesh(sizes)


def test_batch_is_spread_over_all_data_axes():
    mesh = meshes.make_mesh({"data": 2, "fsdp": 2, "model": 2})
    batch = jax.device_put(jnp.zeros((8, 3)), meshes.batch_sharding(mesh))
    assert {shard.data.shape for shard in batch.addressable_shards} == {(2, 3)}
    whole = jax.device_put(jnp.zeros((8, 3)), meshes.replicated(mesh))
    assert {shard.data.shape for shard in whole.addressable_shards} == {(8, 3)}


def test_check_divisible():
    mesh = meshes.make_mesh({"data": 2, "fsdp": 2, "model": 2})
    meshes.check_divisible("--batch", 12, mesh)
    for size in (6, 0, -4):
        with pytest.raises(UserError, match=rf"--batch {size}: .* multiple of 4"):
            meshes.check_divisible("--batch", size, mesh)


def test_shardings_first_rule_wins_and_default_is_replicated():
    mesh = meshes.make_mesh({"data": 4, "fsdp": 2})
    tree = {
        "params": {"a": {"kernel": jnp.zeros((4, 6))}, "b": {"kernel": jnp.zeros((4, 6))}},
        "count": jax.ShapeDtypeStruct((), jnp.int32),
    }
    rules = [("a/kernel$", P(None, "fsdp")), ("kernel$", P(("data", "model"), None))]
    placed = meshes.shardings(tree, mesh, rules)
    assert placed["params"]["a"]["kernel"].spec == P(None, "fsdp")
    assert placed["params"]["b"]["kernel"].spec == P(("data",), None)  # no axis "model" here
    assert placed["count"].spec == P()
    abstract = jax.eval_shape(lambda: tree["params"])
    assert meshes.shardings(abstract, mesh, rules)["a"]["kernel"].spec == P(None, "fsdp")


def test_shardings_refuse_what_does_not_fit():
    mesh = meshes.make_mesh({"data": 4, "fsdp": 2})
    with pytest.raises(UserError, match=r"^w of shape \(3, 5\): 5 does not divide by 2"):
        meshes.shardings({"w": jnp.zeros((3, 5))}, mesh, [("w", P(None, "fsdp"))])
    with pytest.raises(UserError, match="has more axes"):
        meshes.shardings({"w": jnp.zeros(4)}, mesh, [("w", P(None, "fsdp"))])


@dataclasses.dataclass(frozen=True)
class Chip:
    """What a mesh asks of a TPU's device."""

    id: int
    slice_index: int
    coords: tuple[int, int, int]
    platform: str = "tpu"
    device_kind: str = "TPU v5 lite"
    core_on_chip: int = 0
    process_index: int = 0


def two_slices() -> list[Chip]:
    """Two of 2 x 2 chips, numbered across."""
    return [Chip(i, i % 2, (i // 2 % 2, i // 4, 0)) for i in range(8)]


@pytest.mark.parametrize(("data", "fsdp"), [(4, 2), (2, 4), (8, 1)])
def test_only_data_leads_from_slice_to_slice(data, fsdp, monkeypatch):
    monkeypatch.setattr(meshes, "Mesh", lambda devices, names, axis_types: devices)
    ordered = meshes.make_mesh({"data": -1, "fsdp": fsdp}, two_slices())
    slices = [[chip.slice_index for chip in row] for row in ordered]
    assert slices == [[0] * fsdp] * (data // 2) + [[1] * fsdp] * (data // 2)
    assert sorted(chip.id for row in ordered for chip in row) == list(range(8))


def test_a_mesh_without_data_for_every_slice_is_refused():
    with pytest.raises(UserError, match="data must be a multiple of 2, the number of slices"):
        meshes.make_mesh({"data": 1, "fsdp": 8}, two_slices())
