"""Reports of language runs from files written by hand; areas, scales and lines by hand too."""

import base64
import io
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

import experiments
from experiments import comparison, heat_map, language_report, report
from experiments.comparison import Response
from experiments.heat_map import START, Block

ARMS = ("sparse", "rloo", "unheard_of")
WORDS = ("one", " <b>", "$x_1$", "\n", "<stop>")
REWARDS = (0.5, -1.0, 0.0, 0.25, -0.125)


def write_run(
    directory: Path, seed: int = 0, arms=ARMS, iterations: int = 30, gold: bool = True, samples=True
) -> Path:
    """A run as experiments leave it: arm i gains (i + 1) / 100 gold an iteration, + seed / 10."""
    directory.mkdir(parents=True, exist_ok=True)
    config = {"source": {"name": "text"}, "arms": list(arms), "seed": seed}
    env = {"experiment": "r3hf", "preset": "tiny", "command": "python -m experiments.r3hf tiny",
           "jax": "0.10.2", "device": "cpu", "devices": 1, "cpus": 2}  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "env.json").write_text(json.dumps(env))
    accuracy = {"reward model/accuracy on held-back pairs": 0.75}
    (directory / "result.json").write_text(json.dumps(accuracy))
    for index, arm in enumerate(arms):
        folder = directory / arm
        folder.mkdir()
        rows = [{"step": 0, **evaluation(0.0, 0.0, gold), "seconds": 0.0}]
        for step in range(1, iterations + 1):
            score = step * (index + 1) / 100 + seed / 10
            rows.append(iteration(step, score if gold else 0.0, critic=arm != "rloo"))
            if step % 10 == 0:
                rows[-1] |= evaluation(score, step / 2, gold)
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "result.json").write_text(json.dumps({"arm": arm}))
        if samples:
            for when in ("before", "after"):
                write_samples(folder / f"samples-{when}.json")
    return directory


def evaluation(score: float, kl: float, gold: bool) -> dict[str, float]:
    numbers = {"gold": score if gold else 0.0, "proxy": 2 * score - 3, "kl": kl + 1e-8,
               "length": 12.0, "truncated": 0.25}  # fmt: skip
    return {f"heldout/{name}": value for name, value in numbers.items()}


def iteration(step: int, gold: float, critic: bool) -> dict[str, float]:
    row = {"step": step, "gold": gold, "proxy": -2.5, "length": 11.0, "truncated": 0.125,
           "kl": 0.5, "entropy": 2.0, "positive_share": 0.5, "episodes": 64 * step,
           "tokens": 700 * step, "seconds": 20.0 + step}  # fmt: skip
    return row | ({"explained_variance": 0.4} if critic else {})


def write_samples(path: Path) -> None:
    each = {"prompt": ["what", "<is>"], "response": WORDS, "reward": REWARDS, "score": -2.25,
            "gold": 1.5}  # fmt: skip
    path.write_text(json.dumps({"samples": [each] * 6}))


def answer(words, rewards) -> Response:
    return Response(("p",), tuple(words), tuple(rewards), 0.0, 0.0)


# --- the page ------------------------------------------------------------------------------------


def test_report_is_complete_and_needs_nothing_else(tmp_path):
    pytest.importorskip("matplotlib", reason="plots come with the extra `report`")
    path = report.build(write_run(tmp_path / "run"))
    page = path.read_text("utf-8")
    assert path == tmp_path / "run" / "report.html"
    assert all(f"<td>{name}</td>" in page for name in (START, *ARMS))
    assert "python -m experiments.r3hf tiny" in page and "source text" in page
    assert "the reward model orders 75.0 % of held-back pairs as labelled" in page
    assert "running means over 2 iterations" in page
    assert "<script" not in page and "<link" not in page
    assert not re.findall(r"https?:|(?:src|href)=\"(?!data:)", page)
    inline = re.findall(r"data:image/png;base64,([A-Za-z0-9+/=]+)", page)
    names = ["reward", "kl", "length", "health", "tokens"]
    files = [(tmp_path / "run" / f"{name}.png").read_bytes() for name in names]
    assert [base64.b64decode(text) for text in inline] == files


def test_words_of_the_page_carry_their_rewards(tmp_path):
    run = comparison.read(write_run(tmp_path / "run"))
    html = "\n".join(heat_map.section(run, gold=True))
    blue, orange = heat_map.colour(1.0, 1.0), heat_map.colour(-1.0, 1.0)
    assert f'title="-1" style="background:{orange};color:#ffffff">&lt;b&gt;</span>' in html
    assert 'title="+0" style="background:#ffffff;color:#222222">$x_1$</span>' in html
    assert f"{orange}, #ffffff, {blue}" in html
    assert html.count('<div class="heat">') == heat_map.MOST_PROMPTS
    assert html.count('class="word"') == heat_map.MOST_PROMPTS * 4 * len(WORDS)
    assert "Prompt: what &lt;is&gt;" in html and "<td>1.50</td>" in html
    assert "<td>1.50</td>" not in "\n".join(heat_map.section(run, gold=False))


def test_report_without_gold_or_samples_leaves_them_out(tmp_path):
    pytest.importorskip("matplotlib", reason="plots come with the extra `report`")
    from experiments import language_plots

    run = comparison.read(write_run(tmp_path / "run", arms=("rloo",), gold=False, samples=False))
    drawn = dict(language_plots.figures(run))
    assert list(drawn) == ["reward", "kl", "length", "health"]
    assert [len(drawn[name].axes) for name in ("reward", "kl", "health")] == [2, 1, 2]
    page = language_report.page(run, {})
    assert "gold" not in page and "Rewards of tokens" not in page
    heads, subs = report.table(tmp_path / "run").splitlines()[:2]
    assert heads.split()[:4] == ["proxy"] * 3 + ["KL"]
    assert subs.split()[:4] == ["held-out", "area", "last", "tenth"]


def test_what_is_known_of_gold_is_drawn(tmp_path):
    pytest.importorskip("matplotlib", reason="plots come with the extra `report`")
    from experiments import language_plots

    run = comparison.read(write_run(tmp_path / "run", arms=("sparse",), samples=False))
    drawn = dict(language_plots.figures(run))
    left, right = drawn["kl"].axes
    path = left.get_lines()[0].get_xydata()
    np.testing.assert_allclose(path, [[0, 0], [5, 0.1], [10, 0.2], [15, 0.3]], atol=1e-6)
    np.testing.assert_allclose(right.get_lines()[0].get_ydata(), [-3, -2.8, -2.6, -2.4])
    gold = drawn["reward"].axes[0].get_lines()
    training = gold[1].get_xydata()  # after the start's level
    assert training.shape == (29, 2)
    np.testing.assert_allclose(training[0], [96, 0.015])
    time = drawn["reward"].axes[1].get_lines()[-1].get_xdata()
    np.testing.assert_allclose(time, [0, 9, 19, 29])  # without the 21 s of the first iteration


# --- numbers -------------------------------------------------------------------------------------


def estimates(rows, measures, head, sub):
    at = [each.column[:2] for each in measures].index((head, sub))
    return {name: rows[name][at] for name in rows}


def test_final_numbers_are_ends_areas_and_last_tenths(tmp_path):
    run = comparison.read(write_run(tmp_path / "run"))
    measures = (*language_report.QUALITY, *language_report.COST)
    rows = language_report.final_numbers(run, measures)
    assert list(rows) == [START, *ARMS]

    def means(head, sub):
        return [float(e.mean) for e in estimates(rows, measures, head, sub).values()]

    np.testing.assert_allclose(means("gold", "held-out"), [0, 0.3, 0.6, 0.9])
    np.testing.assert_allclose(means("gold", "area"), [np.nan, 0.155, 0.31, 0.465])
    np.testing.assert_allclose(means("gold", "last tenth"), [np.nan, 0.29, 0.58, 0.87])
    assert means("KL (nats)", "held-out") == [0, 15, 15, 15]
    assert means("truncated (%)", "held-out") == [25] * 4
    assert means("sampled", "responses") == [0] + [64 * 30] * 3
    assert means("time", "s") == [0] + [50] * 3


def test_seeds_are_averaged_and_paired(tmp_path):
    for seed in (0, 1, 5):
        write_run(tmp_path / f"seed-{seed}", seed, samples=False)
    run = comparison.read(tmp_path)
    differences = language_report.differences(run, language_report.QUALITY)
    assert list(differences) == list(ARMS[1:])
    found = estimates(differences, language_report.QUALITY, "gold", "held-out")["unheard_of"]
    np.testing.assert_allclose([found.mean, found.low, found.high], 0.6)
    text = report.table(tmp_path)
    assert "Means over 3 seeds" in text and "0.50" in text
    assert "<td>rloo - sparse</td>" in language_report.page(run, {})


def test_table_names_what_is_not_finished_and_needs_no_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "experiments.plots", raising=False)
    monkeypatch.delattr(experiments, "plots", raising=False)
    run = write_run(tmp_path / "run", arms=ARMS[:1])
    (run / "sparse" / "result.json").unlink()
    lines = report.table(run).splitlines()
    assert [line.split()[0] for line in lines[2:4]] == [START, "sparse"]
    assert lines[3].split()[1:] == [
        "0.300",
        "0.155",
        "0.290",
        "-2.40",
        "15",
        "12",
        "25",
        "1,920",
        "50",
    ]
    assert lines[-1] == "Not finished: sparse, seed 0, at iteration 30."


def test_a_run_that_has_only_begun_is_reported(tmp_path):
    pytest.importorskip("matplotlib", reason="plots come with the extra `report`")
    from experiments import language_plots, plots

    run = write_run(tmp_path / "run", iterations=0, arms=ARMS[:1], samples=False)
    drawn = dict(language_plots.figures(comparison.read(run)))
    assert list(drawn) == ["reward", "kl", "length", "health"]
    assert plots.png(drawn["health"]).startswith(b"\x89PNG")


# --- words ---------------------------------------------------------------------------------------


def test_colours_are_symmetric_and_end_at_the_limit():
    assert heat_map.colour(0.0, 2.0) == "#ffffff"
    assert heat_map.colour(2.0, 2.0) == heat_map.colour(9.0, 2.0) == "#2166ac"
    assert heat_map.colour(-2.0, 2.0) == "#b35806"
    assert heat_map.colour(1.0, 2.0) == "#90b2d6"


def test_scale_is_one_for_all_and_covers_all_but_the_strongest():
    many = answer(["w"] * 99, np.linspace(-0.5, 0.48, 99))
    block = Block(("p",), ((START, many), ("sparse", answer(["w"], [40.0]))))
    assert 0.4 < heat_map.limit([block]) < 0.51
    assert heat_map.limit([Block(("p",), ((START, answer(["w"], [0.0])),))]) == 1.0
    assert heat_map.limit([Block(("p",), ((START, answer([], [])),))]) == 1.0


def test_words_without_ink_are_seen_and_prompts_keep_their_spaces():
    assert [heat_map.visible(word) for word in (" a", "\n", " ", "")] == ["a", "↵", "␣", "␣"]
    assert heat_map.text_of(["one", "two", "three"], most=2) == "… two three"
    assert heat_map.text_of(["Why", " not", "?"]) == "Why not?"


def test_boxes_fill_lines_and_long_answers_are_cut():
    pytest.importorskip("matplotlib", reason="plots come with the extra `report`")
    from experiments import language_plots

    placed = language_plots.boxes(answer(["abc", "de", "fghijklmnop"], [0, 0, 0]), columns=8)
    assert [(box.word, box.left, box.width, box.row) for box in placed] == [
        ("abc", 0, 4, 0),
        ("de", 4, 3, 0),
        ("fghijkl", 0, 8, 1),
    ]
    cut = language_plots.boxes(answer(["w"] * 500, [1.0] * 500), columns=100)
    assert len(cut) == heat_map.MOST_WORDS + 1
    assert cut[-1].word == "…" and cut[-1].reward == 0
    assert language_plots.drawable("a中") == "a□"


def test_picture_of_words_grows_with_its_answers(tmp_path):
    pytest.importorskip("matplotlib", reason="plots come with the extra `report`")
    from matplotlib.image import imread

    from experiments import language_plots, plots

    def size(count):
        words = answer(["word\n中$"] * count, [0.1] * count)
        with plots.styled():
            drawn = language_plots.tokens_figure([Block(("p",), ((START, words),))], gold=True)
            return imread(io.BytesIO(plots.png(drawn)), format="png").shape[:2]

    (none, narrow), (few, _), (many, wide) = size(0), size(3), size(60)
    assert none == few < many and narrow < wide <= 140 * language_plots.WIDEST + 1
