"""The bench of Stable Diffusion's U-Net: its work must be what a run does, and its lines true."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest

from experiments import bench, bench_sd
from experiments import bench_sd_programs as programs
from experiments.bench_sd import Tried
from experiments.bench_sd_programs import Program, Setting
from experiments.measuring import Spent, Timing
from jaxalign.core.types import UserError

TINY = dataclasses.replace(bench_sd.sd(), size="tiny", steps=2, repeats=2, torch=False)
SETTING = Setting(8, False)


@pytest.fixture(scope="module")
def problem() -> programs.Problem:
    return programs.make_problem(bench_sd.SIZES["tiny"], steps=2, seed=0)


@pytest.fixture(scope="module")
def pairs(problem) -> programs.Pairs:
    return programs.make_pairs(problem, 8)


@pytest.fixture(scope="module")
def rollout(problem) -> Program:
    return programs.Ours(problem, "rollout", None).program(SETTING)


@pytest.fixture(scope="module")
def update(problem, pairs) -> Program:
    return programs.Ours(problem, "update", pairs).program(SETTING)


def test_a_rollout_uses_the_noise_that_torch_is_given(problem, rollout):
    last, path, density = jax.device_get(rollout.run(3))
    assert path.shape == (3, 8, 4, 4, 4) and density.shape == (2, 8)
    np.testing.assert_array_equal(path[-1], last)
    assert np.isfinite(density).all() and len(np.unique(path[0])) == path[0].size
    keyed = jax.device_get(rollout.run(0))
    assert np.abs(keyed[0] - last).max() > 0.1  # turns differ
    noise = programs.path_noise(problem, 8)
    assert noise.shape == path.shape and rollout.outcome().shape == (last.size,)
    assert rollout.memory() > sum(leaf.nbytes for leaf in jax.tree.leaves(problem.params))


def test_an_update_is_on_policy_and_moves_every_adapter(problem, pairs, update):
    gradient, adapters, optimizer = jax.device_get(update.run(0))
    before = problem.params["lora"]
    assert len(before) == 8 * 4 and gradient.keys() == before.keys()
    jax.tree.map(lambda g: np.testing.assert_array_less(0, np.abs(g).max()), gradient)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), adapters, before)
    rate = problem.config.learning_rate
    assert rate / 10 < min(jax.tree.leaves(moved)) <= max(jax.tree.leaves(moved)) < 2 * rate
    assert any(leaf.ndim == 2 for leaf in jax.tree.leaves(optimizer))
    leaves = [np.ravel(leaf) for leaf in jax.tree.leaves(gradient)]
    np.testing.assert_array_equal(update.outcome(), np.concatenate(leaves))
    twice = programs.tiled(pairs, 12)
    np.testing.assert_array_equal(twice.x[8:], pairs.x[:4])
    np.testing.assert_array_equal(twice.log_density[8:], pairs.log_density[:4])


def test_operations_are_of_both_guided_rows_at_every_step(problem, pairs):
    once = programs.image_flops(problem, "rollout", None)
    config = dataclasses.replace(problem.config, steps=4, suffix_start=4, suffix_stop=4)
    sampler = programs.make_problem(problem.size, 4, 0).sampler
    longer = problem._replace(config=config, sampler=sampler)
    merging = 2 * sum(
        pair["down"].size * pair["up"].shape[1] for pair in problem.params["lora"].values()
    )
    fixed = merging / 8  # once a batch of 8
    assert programs.image_flops(longer, "rollout", None) - fixed == 2 * (once - fixed)
    single = (once - fixed) / 2
    learned = programs.image_flops(problem, "update", pairs)
    assert 1.5 * single < learned < 3 * single  # no gradients of convolutions' kernels


def test_lines_of_json(problem, pairs, rollout, update, monkeypatch, capsys):
    made = {"rollout": rollout, "update": update}  # compiled already
    monkeypatch.setattr(programs, "make_pairs", lambda problem, batch: pairs)
    monkeypatch.setattr(
        bench_sd,
        "implementations",
        lambda bench, problem, case, pairs: {"jaxalign": lambda _: made[case]},
    )
    lines = bench_sd.run(TINY)
    shown = capsys.readouterr()
    printed = [json.loads(line) for line in shown.out.splitlines()]
    assert [line["case"] for line in printed] == ["sd-rollout", "sd-update"]
    for line, read in zip(lines, printed, strict=True):
        assert read == json.loads(json.dumps(line)) | read and read["jax"]
        assert line["implementation"] == "jaxalign" and line["ratio"] == line["cpu_ratio"] == 1
        assert line["images_per_second"] == 8 / line["median_seconds"]
        assert line["flops_per_second"] == line["flops"] * line["images_per_second"]
        assert line["peak_share"] is None and line["difference"] == 0
        assert (line["batch"], line["repeats"], line["steps"]) == (8, 2, 2)
    assert "of peak" in shown.err and "8 at once" in shown.err


def test_a_ratio_is_of_seconds_an_image(problem):
    """Twice as many images in three times the seconds: half as slow again."""
    turns = [Spent(1.0, 2.0), Spent(2.0, 4.0)]
    slower = [Spent(3.0, 4.0), Spent(6.0, 8.0)]
    timings = {
        "jaxalign": Timing(5.0, turns, [4, 4], 0),
        "diffusers": Timing(5.0, slower, [8, 8], 0),
    }
    program = Program(lambda turn: None, lambda: np.zeros(1), lambda: None)
    tried = Tried("diffusers", program, Setting(8, True), 3.0, 7.0)
    line = bench_sd.describe("update", problem, tried, timings, 1e9, 0.01)
    assert (line["ratio"], line["cpu_ratio"], line["compile_seconds"]) == (1.5, 1.0, 7.0)
    assert line["note"] == "8 at once, rematerialised" and line["peak_memory_bytes"] is None
    assert line["images_per_second"] == 8 / 4.5


def make_until(limits: dict[bool, int], seen: list[Setting]):
    """Programs that fit up to a batch, with and without rematerialisation."""

    def make(setting: Setting) -> Program:
        seen.append(setting)
        if setting.batch > limits[setting.remat]:
            raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate")
        return Program(lambda turn: None, lambda: np.zeros(1), lambda: None)

    return make


def test_batches_grow_until_memory_ends():
    settings = [Setting(batch, remat) for batch in (4, 8, 16) for remat in (False, True)]
    seen: list[Setting] = []
    tried = bench_sd.attempts("x", make_until({False: 4, True: 8}, seen), settings)
    assert [t.setting for t in tried] == [Setting(4, False), Setting(4, True), Setting(8, True)]
    assert seen == [*settings[:4], Setting(16, True)]  # one failure of a kind is enough
    with pytest.raises(UserError, match="no memory for 4 images at once; give fewer"):
        bench_sd.attempts("x", make_until({False: 0, True: 0}, seen), settings)
    with pytest.raises(KeyError):  # another fault is not taken for want of memory
        bench_sd.attempts("x", make_until({}, seen), settings)


def test_other_work_is_not_timed(problem):
    def making(outcome):
        return lambda setting: Program(lambda turn: None, lambda: outcome, lambda: None)

    same, other = np.arange(4.0), np.array([0.0, 1.0, 2.0, 3.1])
    makes = {"jaxalign": making(same), "diffusers": making(same * 1.0001)}
    chosen, errors = bench_sd.choose(problem, makes, [SETTING])
    assert [tried.name for tried in chosen] == ["jaxalign", "diffusers"]
    assert errors["jaxalign"] == 0 < errors["diffusers"] < 2e-4
    for wrong in (other, same[:3], np.full(4, np.nan)):
        with pytest.raises(bench_sd.Differs, match="diffusers"):
            bench_sd.choose(problem, makes | {"diffusers": making(wrong)}, [SETTING])


def test_a_compiler_that_fails_is_left_out(problem, capsys):
    def fails(setting):
        raise RuntimeError("no C++ compiler\nfound")

    program = Program(lambda turn: None, lambda: np.ones(1), lambda: None)
    makes = {"jaxalign": lambda setting: program, "diffusers_compiled": fails}
    chosen, _ = bench_sd.choose(problem, makes, [SETTING])
    assert [tried.name for tried in chosen] == ["jaxalign"]
    assert "torch.compile failed: RuntimeError: no C++ compiler" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("cpu", None),
    ],
)
def test_the_peaks_of_devices(kind, peak):
    assert bench_sd.device_peak(kind) == peak


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--batches", "3"], "batches 3"),
        (["--steps", "0"], "steps = 0: must be at least 1"),
        (["--batches", "0"], "batches = "),
        (["--size", "large"], "size"),
    ],
)
def test_wrong_sizes_are_refused_in_one_line(flags, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        bench.main(["sd-update", "--size", "tiny", "--no-torch", *flags])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and message in error and "Traceback" not in error
