"""Reports and RESULTS.md from files written by hand; statistics against hand-made numbers."""

import base64
import io
import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest

import experiments
from experiments import comparison, report, statistics
from jaxalign.core.types import UserError

PROMPTS = {
    "train": ("a small zero", "a $5 <b>seven</b> & an eight", "a thin one"),
    "heldout": ("a large two", "a nine leaning right"),
}
ARMS = ("ddpo", "official", "unheard_of")


def write_run(directory: Path, seed: int = 0, arms=ARMS, stages: int = 4, finished=True) -> Path:
    """A run as experiments leave it: rewards of arm i end at -5 + i + 0.1 * seed on both lists."""
    directory.mkdir(parents=True, exist_ok=True)
    config = {"world": "digits", "reward": "mixed", "arms": list(arms), "seed": seed}
    env = {"experiment": "b2_diffurl", "preset": "tiny",
           "command": "python -m experiments.b2_diffurl tiny",
           "jax": "0.10.2", "device": "cpu", "devices": 1, "cpus": 2}  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "env.json").write_text(json.dumps(env))
    for index, arm in enumerate(arms):
        folder = directory / arm
        folder.mkdir()
        end = -5.0 + index + 0.1 * seed
        rows = [{"step": 0, **evaluation(-6.0), "seconds": 0.0}]
        rows += [stage_row(step) for step in range(1, stages + 1)]
        rows[2] |= evaluation((end - 6.0) / 2)
        rows[-1] |= evaluation(end)
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        if finished:
            (folder / "result.json").write_text(json.dumps({"arm": arm}))
        write_samples(folder / "samples-before.npz", -6.0, seed)
        write_samples(folder / "samples-after.npz", end, seed + 10)
    return directory


def evaluation(reward: float) -> dict[str, float]:
    numbers = {
        "reward": reward,
        "success": 0.25,
        "entropy": 0.5,
        "distance": 0.8,
        "divergence": 30.0,
    }
    return {f"{name}/{key}": value for name in PROMPTS for key, value in numbers.items()}


def stage_row(step: int) -> dict[str, float]:
    return {"step": step, "reward": -5.5, "reward_evaluations": 16 * step, "suffix": 3,
            "network_evaluations": 64 * step, "trained_pairs": 32 * step, "within_share": 0.4,
            "seconds": 1.5 * step}  # fmt: skip


def write_samples(path: Path, reward: float, seed: int) -> None:
    rng, arrays = np.random.default_rng(seed), {}
    for name, prompts in PROMPTS.items():
        count = len(prompts)
        arrays[f"{name}/images"] = rng.integers(0, 255, (count, 4, 8, 8, 1)).astype(np.uint8)
        arrays[f"{name}/prompts"] = np.array(prompts)
        arrays[f"{name}/reward"] = np.full((count, 6), reward)
        arrays[f"{name}/success"] = rng.integers(0, 2, (count, 6)).astype(float)
    np.savez_compressed(path, **arrays)


# --- report.html ---------------------------------------------------------------------------------

NAMES = ["reward", "samples-train", "samples-heldout", "diversity", "prompts", "stages"]


def read_png(content: bytes) -> np.ndarray:
    from matplotlib.image import imread

    return imread(io.BytesIO(content), format="png")


def test_report_is_complete_and_needs_nothing_else(tmp_path):
    pytest.importorskip("matplotlib", reason="plots come with the extra `report`")
    path = report.build(write_run(tmp_path / "run"))
    page = path.read_text("utf-8")
    assert path == tmp_path / "run" / "report.html"
    for arm in ("base", *ARMS):
        assert f"<td>{arm}</td>" in page
    assert "a small zero" in page and "a nine leaning right" in page
    assert "a $5 &lt;b&gt;seven&lt;/b&gt; &amp; an eight" in page
    assert "python -m experiments.b2_diffurl tiny" in page and "jax 0.10.2" in page
    assert "<script" not in page and "<link" not in page
    assert not re.findall(r"https?:|(?:src|href)=\"(?!data:)", page)
    inline = re.findall(r"data:image/png;base64,([A-Za-z0-9+/=]+)", page)
    files = [(tmp_path / "run" / f"{name}.png").read_bytes() for name in NAMES]
    assert [base64.b64decode(text) for text in inline] == files
    for content in files:
        assert min(read_png(content).shape[:2]) > 100


def test_final_numbers_are_those_of_the_last_evaluation(tmp_path):
    run = comparison.read(write_run(tmp_path / "run"))
    shown = {c.metric: i for i, c in enumerate(report.COLUMNS)}
    numbers = report.final_numbers(run)
    assert list(numbers) == ["base", *ARMS]
    assert [float(row[shown["heldout/reward"]].mean) for row in numbers.values()] == [
        -6,
        -5,
        -4,
        -3,
    ]
    assert float(numbers["ddpo"][shown["cost"]].mean) == 4 * (64 + 3 * 32)
    assert float(numbers["base"][shown["cost"]].mean) == 0
    assert float(numbers["ddpo"][shown["train/success"]].mean) == 25


def test_seeds_are_averaged_and_paired(tmp_path):
    for seed in (3, 4, 10):
        write_run(tmp_path / f"seed-{seed}", seed)
    run = comparison.read(tmp_path)
    assert run.seeds == (3, 4, 10)
    values = comparison.curve(run.of("official"), "reward_evaluations", "train/reward")
    assert values.shape == (3, 2, 3)
    np.testing.assert_allclose(values[:, 1, -1], [-3.7, -3.6, -3.0])
    np.testing.assert_allclose(values[0], [[0, 32, 64], [-6, -4.85, -3.7]])
    paired = report.differences(run)["official"][0]
    np.testing.assert_allclose([paired.mean, paired.low, paired.high], 1.0)
    text = report.table(tmp_path)
    assert "-4.43 [" not in text and "-4.43" in text and "Means over 3 seeds" in text


def test_report_of_seeds_shows_the_differences(tmp_path):
    pytest.importorskip("matplotlib", reason="plots come with the extra `report`")
    for seed in (0, 1):
        write_run(tmp_path / f"seed-{seed}", seed, arms=ARMS[:2])
    page = report.build(tmp_path).read_text("utf-8")
    assert "<td>official - ddpo</td>" in page and "Means over 2 seeds" in page


def test_table_has_a_line_for_the_base_and_each_arm(tmp_path):
    lines = report.table(write_run(tmp_path / "run")).splitlines()
    assert [line.split()[0] for line in lines[2:6]] == ["base", *ARMS]
    assert lines[3].split()[1:] == [
        "-5",
        "-5",
        "25",
        "25",
        "0.500",
        "0.800",
        "30",
        "64",
        "640",
        "6",
    ]
    assert not any("Not finished" in line for line in lines)


def test_unfinished_run_is_reported_as_far_as_it_went(tmp_path):
    pytest.importorskip("matplotlib", reason="plots come with the extra `report`")
    run = write_run(tmp_path / "run", arms=("ddpo",), finished=False)
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"arms": ["ddpo", "official"]}))
    (run / "ddpo" / "samples-after.npz").unlink()
    with open(run / "ddpo" / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "rew')  # a row in the making
    page = report.build(run).read_text("utf-8")
    assert "Not finished: ddpo, seed 0, at stage 4" in page
    assert "Not finished: official, seed 0, not begun" in page
    assert "Not finished: ddpo, seed 0, at stage 4." in report.table(run)


def test_only_the_base_was_measured(tmp_path):
    pytest.importorskip("matplotlib", reason="plots come with the extra `report`")
    from experiments import plots

    run = write_run(tmp_path / "run", arms=("ddpo",), finished=False)
    first = (run / "ddpo" / "metrics.jsonl").read_text().splitlines()[0]
    (run / "ddpo" / "metrics.jsonl").write_text(first + "\n")
    drawn = dict(plots.figures(comparison.read(run)))
    assert list(drawn) == NAMES
    assert read_png(plots.png(drawn["diversity"])).shape[2] == 4


@pytest.mark.parametrize("kind", ["absent", "empty", "arm", "no metrics"])
def test_what_is_no_run_gets_one_line(tmp_path, kind):
    run = write_run(tmp_path / "run")
    path = {"absent": tmp_path / "gone", "empty": tmp_path, "arm": run / "ddpo", "no metrics": run}[
        kind
    ]
    if kind == "no metrics":
        for file in run.glob("*/metrics.jsonl"):
            file.write_text("")
    with pytest.raises(UserError) as caught:
        report.build(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert ("its parent is one" in str(caught.value)) == (kind == "arm")


def test_command_ends_with_one_line_and_status_two(tmp_path, capsys):
    for words in ([str(tmp_path)], ["--all"]):
        with pytest.raises(SystemExit) as ended:
            report.main(words)
        printed = capsys.readouterr().err
        assert ended.value.code == 2 and printed.startswith("error: ") and printed.count("\n") == 1


def test_table_needs_no_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "experiments.plots", raising=False)
    monkeypatch.delattr(experiments, "plots", raising=False)
    run = write_run(tmp_path / "run")
    assert "ddpo" in report.table(run)
    with pytest.raises(UserError, match=r"jaxalign\[report\]"):
        report.build(run)


# --- RESULTS.md ----------------------------------------------------------------------------------

RESULT = {
    "title": "Claims", "command": "python -m experiments.b2_diffurl claims",
    "hardware": "2 CPU cores", "date": "2025-01-31", "seeds": [0, 1],
    "notes": ["No gain on the early reward."],
    "tables": [{
        "title": "Reward", "columns": ["arm", "mixed", "evaluations", "paper"],
        "rows": [
            ["ddpo", {"mean": -2.34567, "low": -2.5012, "high": -2.2001}, {"value": 4800}, "-"],
            ["a | b", {"mean": -2.0, "low": None, "high": None}, {"value": 0.012345}, "1.2"],
        ],
    }],
    "figures": ["claims.png"],
}  # fmt: skip


def write_result(directory: Path, **changes) -> Path:
    (directory / "results").mkdir()
    (directory / "results" / "claims.png").write_bytes(b"picture")
    (directory / "results" / "claims.json").write_text(json.dumps(RESULT | changes))
    return directory


def test_results_are_generated_from_the_files(tmp_path):
    write_result(tmp_path)
    text = report.build_results(tmp_path / "results", tmp_path / "RESULTS.md").read_text("utf-8")
    lines = text.splitlines()
    assert "Generated by `python -m experiments.report`" in lines[2]
    assert "`python -m experiments.b2_diffurl claims`" in lines
    assert "2 CPU cores; 2025-01-31; seeds 0, 1." in lines
    assert (
        "| arm | mixed | evaluations | paper |" in lines and "| --- | ---: | ---: | --- |" in lines
    )
    assert "| ddpo | -2.35 [-2.50, -2.20] | 4,800 | - |" in lines
    assert "| a \\| b | -2 | 0.0123 | 1.2 |" in lines
    assert "![Claims](results/claims.png)" in lines and "- No gain on the early reward." in lines
    again = report.build_results(tmp_path / "results", tmp_path / "RESULTS.md").read_text("utf-8")
    assert again == text


@pytest.mark.parametrize(
    ("changes", "blamed"),
    [
        ({"seeds": "0"}, "seeds"),
        ({"tables": [{"title": "t", "columns": ["a"], "rows": [["x", "y"]]}]}, "1 columns"),
        ({"tables": [{"title": "t", "columns": ["a"], "rows": [[{"mediam": 1}]]}]}, "mediam"),
        ({"tables": [{"title": "t"}]}, "columns"),
        ({"figures": ["gone.png"]}, "gone.png"),
    ],
)
def test_a_wrong_result_file_is_named(tmp_path, changes, blamed):
    write_result(tmp_path, **changes)
    with pytest.raises(UserError, match=blamed) as caught:
        report.build_results(tmp_path / "results", tmp_path / "RESULTS.md")
    assert "claims.json" in str(caught.value)
    assert not (tmp_path / "RESULTS.md").exists()


def test_committed_results_are_as_generated(tmp_path):
    target = report.HERE / "RESULTS.md"
    if not target.exists():
        assert not list((report.HERE / "results").glob("*.json")), (
            "run python -m experiments.report"
        )
        return
    before = target.read_text("utf-8")
    fresh = report.results_text(report.HERE / "results", report.HERE)
    assert fresh == before, f"run {report.COMMAND}"


@pytest.mark.parametrize(
    ("value", "text"),
    [(-7.857, "-7.86"), (4800, "4,800"), (1234.5, "1,234"), (0.0123456, "0.0123"), (0.0, "0"),
     (-0.0, "0"), (12.345, "12.3"), (9.999, "10.00"), (math.nan, "-"), (None, "-"),
     (3e-9, "3.00e-09"), (-0.00012, "-0.000120")],
)  # fmt: skip
def test_numbers_have_three_figures(value, text):
    assert report.number(value) == text


@pytest.mark.parametrize(
    ("parts", "text"),
    [((-2.34567, -2.5012, -2.2001), "-2.35 [-2.50, -2.20]"), ((1.0, 1.0, 1.0), "1"),
     ((1500.0, 1400.0, 1600.0), "1,500 [1,400, 1,600]"), ((0.5, math.nan, math.nan), "0.500"),
     ((0.001, -0.02, 0.02), "0.001 [-0.020, 0.020]")],
)  # fmt: skip
def test_intervals_have_two_figures_of_the_half_width(parts, text):
    assert report.interval(*parts) == text


# --- statistics ----------------------------------------------------------------------------------


def test_mean_interval_is_the_same_each_time_and_entry_by_entry():
    values = np.random.default_rng(0).normal(size=(8, 3))
    first, again = statistics.mean_interval(values), statistics.mean_interval(values)
    np.testing.assert_array_equal(first.low, again.low)
    np.testing.assert_allclose(first.mean, values.mean(0))
    alone = statistics.mean_interval(values[:, 1])
    np.testing.assert_allclose([first.low[1], first.high[1]], [alone.low, alone.high])
    assert (first.low < first.mean).all() and (first.mean < first.high).all()


def test_two_seeds_span_the_interval_and_one_has_none():
    two = statistics.mean_interval([1.0, 3.0])
    assert (two.mean, two.low, two.high, two.seeds) == (2.0, 1.0, 3.0, 2)
    one = statistics.mean_interval([4.0])
    assert one.mean == 4.0 and np.isnan(one.low) and np.isnan(one.high)


def test_interval_covers_the_mean_19_times_in_20():
    rng = np.random.default_rng(1)
    for seeds, least in ((8, 0.935), (20, 0.935)):
        many = statistics.mean_interval(rng.normal(5.0, 2.0, (seeds, 1000)))
        covered = ((many.low <= 5.0) & (many.high >= 5.0)).mean()
        assert least <= covered <= 0.97


def test_large_samples_agree_with_the_normal_interval():
    values = np.random.default_rng(2).normal(size=400)
    found, half = statistics.mean_interval(values), 1.96 * values.std(ddof=1) / 20
    expected = [values.mean() - half, values.mean() + half]
    np.testing.assert_allclose([found.low, found.high], expected, atol=0.006)


def test_paired_difference_drops_what_a_seed_does_to_both():
    luck = np.array([0.0, 10.0, -20.0, 5.0])
    found = statistics.paired_difference(luck + np.array([1.0, 1.5, 0.5, 1.0]), luck)
    np.testing.assert_allclose(found.mean, 1.0)
    assert 0.5 <= found.low < 1.0 < found.high <= 1.5
    with pytest.raises(ValueError, match="not paired"):
        statistics.paired_difference([1.0, 2.0], [1.0])


def test_iqm_cuts_a_quarter_at_each_end():
    assert statistics.iqm([100.0, 1.0, 2.0, -50.0]) == 1.5
    assert statistics.iqm([9.0, 1.0, 2.0, 3.0, -9.0]) == 2.0
    assert statistics.iqm([3.0, 6.0]) == 4.5
    np.testing.assert_allclose(statistics.iqm([[1.0, 4.0]] * 8), [1.0, 4.0])
    found = statistics.iqm_interval(np.arange(16.0))
    assert found.low < found.mean == 7.5 < found.high


def test_no_seeds_is_an_error():
    with pytest.raises(ValueError, match="seeds"):
        statistics.mean_interval([])
