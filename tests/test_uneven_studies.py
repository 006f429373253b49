"""Designs that are uneven, or came out so: what can be compared is, what is said of it is true, the rest is named."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
from planted_cells import cell, claim_of, table

from sae_train.evals.intervals import Interval
from sae_train.report.cells import Cell
from sae_train.report.claims import FEW, HOLDS, UNSEEN, claims
from sae_train.report.data import Run
from sae_train.report.study import Study, findings, least, onset, read_study
from sae_train.report.study_charts import figures_of
from sae_train.report.study_files import _uneven, write_tables


def grid(l0s: dict[int, tuple[int, ...]], of=lambda width, l0: 0.1, arch="topk", seeds=lambda width: 3, **more):
    """Cells at the L0 of each width, with a planted mean."""
    return [
        cell(arch, width, l0, table(of(width, l0), seeds(width), draw=width + l0), **more)
        for width, own in l0s.items()
        for l0 in own
    ]


def main_of(cells, question, metric="full"):
    return [c for c in claims(cells) if (c.question, c.metric, c.pooled) == (question, metric, True)]


def study_of(cells) -> Study:
    return Study([], cells, claims(cells), [], ((), 0))


def test_a_width_with_fewer_l0_has_a_mean_of_its_own_beside_the_mean_of_all_l0():
    cells = grid({64: (8, 16, 32, 64), 128: (8, 16, 32, 64), 256: (8, 32)}, lambda w, l0: w / 1000)
    widest, narrow = main_of(cells, "width")
    assert (widest.where, widest.ends) == ("topk, mean over L0 8, 32", ("64", "256"))
    assert (narrow.where, narrow.ends) == ("topk, mean over L0 8, 16, 32, 64", ("64", "128"))
    assert [c.difference.mean for c in (widest, narrow)] == pytest.approx([0.192, 0.064])
    assert widest.means == pytest.approx((0.064, 0.128, 0.256))


def test_a_range_of_l0_that_one_width_alone_has_does_not_take_the_place_of_what_widths_share():
    cells = grid({64: (16, 32), 128: (4, 8, 16, 32)}, lambda w, l0: 0.1 + (l0 / 100 if w == 64 else 0.2 / l0))
    (shared,) = main_of(cells, "l0")
    assert (shared.where, shared.ends) == ("topk, mean over width 64, 128", ("16", "32"))
    part = [c for c in claims(cells) if (c.question, c.metric, c.where) == ("l0", "full", "topk at width 128")]
    assert [(c.ends, c.pooled, c.verdict) for c in part] == [(("4", "32"), False, HOLDS), (("16", "32"), False, UNSEEN)]


@pytest.mark.parametrize("question", ["l0", "arch at L0"])
def test_the_main_claim_rests_on_what_has_enough_seeds_where_something_has(question):
    seeds = lambda width: 3 if width == 64 else 1  # noqa: E731
    cells = grid({64: (8, 16), 128: (8, 16), 256: (8, 16)}, lambda w, l0: 0.3 - l0 / 100, seeds=seeds)
    cells += grid({64: (8, 16), 128: (8, 16), 256: (8, 16)}, lambda w, l0: 0.6 - l0 / 100, "relu", seeds)
    claim = claim_of(cells, question)
    assert claim.seeds == (3, 3) and "64" in claim.where and claim.verdict not in (FEW, UNSEEN)
    study = study_of(cells)
    assert "too few seeds" not in " ".join(findings(study)[0]["L0"])


def test_widths_that_match_are_compared_beside_one_that_does_not():
    cells = grid({64: (8, 32), 128: (8, 32)}, lambda w, l0: w / 1000, "jumprelu")
    cells += [cell("jumprelu", 256, l0, table(0.3, draw=l0), reached=l0 * 1.05) for l0 in (8, 32)]
    (claim,) = main_of(cells, "width")
    assert (claim.ends, claim.where) == (("64", "128"), "jumprelu, mean over L0 8, 32")
    others = {c.verdict for c in claims(cells) if (c.question, c.metric, c.ends) == ("width", "full", ("64", "256"))}
    assert others == {"not compared: L0 5.0\u00a0% apart"}


def test_splitting_is_looked_for_up_to_the_widest_that_can_be_compared():
    cells = grid({64: (8, 16), 128: (8, 16)}, n_split=table(1.0))
    wide = [cell("topk", 256, l0, table(0.1), reached=l0 * 1.05, n_split=table(2.0)) for l0 in (8, 16)]
    claim = claim_of([*cells, *wide], "splitting", "n_split")
    assert "is not seen to set in up to width 128" in onset(claim)
    assert onset(claim_of([*cells[:2], *wide], "splitting", "n_split")) == (
        "Splitting in topk: not compared: L0 5.0\u00a0% apart."
    )


def test_sides_that_overshoot_the_lowest_l0_are_interpolated_to_one_that_both_reach():
    score = lambda l0: 0.3 - 0.05 * math.log2(l0)  # noqa: E731
    cells = [
        cell("relu", width, l0, table(score(l0 * over) + plus, draw=l0 + width), reached=l0 * over)
        for width, over, plus in ((64, 1.01, 0.0), (128, 1.05, 0.1))
        for l0 in (8, 16, 32, 64)
    ]
    parts = [c for c in claims(cells) if (c.question, c.metric, c.pooled) == ("width", "full", False)]
    hows = ["L0 interpolated to 8.4", *["L0 interpolated"] * 3]
    assert [c.how for c in parts] == hows
    assert [c.difference.mean for c in parts] == pytest.approx([0.1] * 4)
    whole = cells[6]
    cells[6] = Cell(whole.setting, whole.arch, whole.width, whole.l0, whole.saes[:2])
    said = {c.where: c.how for c in claims(cells) if (c.question, c.metric) == ("width", "full")}
    assert said["relu at L0 16"].endswith("apart, and not interpolated: training seeds are missing at some L0")


def test_an_l0_that_was_missed_by_far_stands_for_none():
    cells = grid({64: (8, 16), 128: (8, 16)}, lambda w, l0: 0.3 - l0 / 100, "relu")
    cells += [cell("relu", width, 32, table(0.0, draw=width), reached=12.0) for width in (64, 128)]
    (fall,) = main_of(cells, "l0")
    assert fall.ends == ("8", "16") and fall.difference.mean == pytest.approx(-0.08)
    reasons = {c.verdict for c in claims(cells) if c.where in ("relu at width 64", "relu at L0 32")}
    assert {"not compared: relu, 64, L0 32 reached 12.00"} <= reasons
    assert all("32" not in c.where for c in main_of(cells, "width"))


def test_an_architecture_with_one_l0_is_compared_at_its_ev_and_keeps_others_from_being_the_least():
    l0s = (8, 16, 32, 64)
    cells = [
        cell(arch, 64, l0, table(mean, draw=l0 + i), ev=0.6 + 0.05 * math.log2(l0), words_l0=2.0 * l0)
        for i, (arch, mean) in enumerate({"topk": 0.3, "jumprelu": 0.25, "matryoshka": 0.2}.items())
        for l0 in l0s
    ]
    cells.append(cell("relu", 64, 16, table(0.05, draw=77), ev=0.82, words_l0=200.0))
    study = study_of(cells)
    assert "At the same L0, relu has less full absorption than every other architecture" in least(study, "L0")
    assert "At the same EV, relu has less full absorption than every other architecture" in least(study, "EV")
    on_words = least(study, "L0 on the words")
    assert "no architecture is shown" in on_words and "no L0 on the words that both reach" in on_words


def test_one_letter_alone_is_no_claim():
    counts = table(1.0)
    counts[:, 1:] = math.nan
    cells = [cell("topk", w, 8, table(0.1, draw=w), n_split=counts) for w in (64, 128)]
    assert claim_of(cells, metric="n_split").verdict == "not compared: one letter has a value in all cells"


def test_what_is_left_out_comes_with_its_own_reason():
    """Of three runs the last read other activations; one SAE fell silent, and one missed its L0."""

    def run(name, saes, assets):
        found = Run(Path(name), name, {"settings": {}, "eval_assets": {"hash": assets}}, [])
        found.saes.extend(saes)
        return found

    def renamed(of: Cell, run: str, **changes):
        return [replace(sae, name=f"{of.name}-{sae.seed}", run=run, **changes) for sae in of.saes]

    near, far = cell("topk", 64, 8, table(0.1)), cell("topk", 128, 8, table(0.1), reached=12.0)
    idle = renamed(cell("topk", 64, 16, table(0.1, 1)), "one", invalid="it tells no labels apart")
    one = run("one", [*renamed(near, "one"), *renamed(far, "one"), *idle], "a")
    two = run("two", renamed(cell("topk", 256, 8, table(0.1)), "two"), "b")
    said = " ".join(read_study([one, two]).left_out)
    assert "topk, 64, L0 16-0: it tells no labels apart" in said
    assert "topk, 256, L0 8-2: its eval read other activations or words" in said and "no absorption score" not in said
    assert "topk, 128, L0 8: L0 reached is 12.00, which is too far off to count as that L0" in said


def test_an_answer_names_the_parts_that_its_mean_hides():
    fall = {64: 0.10, 128: 0.10, 256: -0.20}
    cells = grid({w: (8, 16) for w in fall}, lambda w, l0: 0.3 + (fall[w] if l0 == 16 else 0.0))
    (said,) = findings(study_of(cells))[0]["L0"]
    assert (
        "not distinguishable" in said and " But at width 64 it rises (+0.100" in said and "width 256 it falls (" in said
    )
    even = grid({64: (8, 16), 128: (8, 16)}, lambda w, l0: 0.3 - l0 / 100)
    assert " But " not in findings(study_of(even))[0]["L0"][0]


def test_the_page_says_that_a_grid_has_gaps():
    whole = grid({64: (8, 16), 128: (8, 16)})
    assert _uneven(study_of(whole)) == ""
    assert "Not every architecture was trained at every width and L0" in _uneven(study_of(whole[:3]))


def test_an_architecture_has_one_colour_in_all_charts_though_it_is_not_at_every_width():
    every = [*grid({1024: (8, 16)}, arch="jumprelu"), *grid({1024: (8, 16), 4096: (8, 16)}, arch="topk")]
    every += grid({4096: (8, 16)}, arch="relu")
    charts = figures_of(every, lambda cell, metric: Interval(0.1, 0.0, 0.2, 0.1), lambda cell: None)["arch"]
    worn = {(name, css.split()[0]) for chart in charts for name, css, _ in chart.series}
    assert len(worn) == len({name for name, _ in worn}) == 3
    for chart in charts:
        assert [css.split()[1] for css, _ in chart.legend] == [css.split()[0] for _, css, _ in chart.series]


def test_a_trend_that_is_where_splitting_sets_in_is_shown_once():
    """Over three widths the trend has a mean more than the onset has."""
    counts = {256: 1.0, 1024: 1.0, 4096: 2.0}
    study = study_of([
        cell("topk", width, l0, table(0.1), n_split=table(count, draw=width + l0))
        for width, count in counts.items() for l0 in (8, 16)
    ])  # fmt: skip
    assert [claim.ends for claim in study.of("splitting") if claim.pooled and claim.question != "l0"] == [("256", "4k")]


def test_points_against_another_score_say_where_their_line_begins_and_ends():
    cells = grid({1024: (8, 16, 32)})
    interval = lambda cell, metric: Interval(cell.l0, cell.l0 - 1, cell.l0 + 1, 1.0)  # noqa: E731
    chart = next(c for c in figures_of(cells, interval, lambda cell: None)["main"] if c.x_title == "recall")
    assert [point.beside for point in chart.series[0][2]] == ["L0 8", "", "L0 32"]


def test_the_least_at_a_width_where_the_least_of_all_was_not_trained_is_named():
    of = {"relu": {1024: 0.1}, "topk": {1024: 0.3, 4096: 0.5}, "matryoshka": {1024: 0.3, 4096: 0.2}}
    cells = [
        cell(arch, width, l0, table(mean, draw=width + l0 + len(arch)))
        for arch, by_width in of.items() for width, mean in by_width.items() for l0 in (8, 16)
    ]  # fmt: skip
    said = least(study_of(cells), "L0")
    assert "relu has less full absorption than every other architecture" in said
    assert "But at width 4k, where relu was not trained, it is matryoshka (matryoshka minus topk −" in said
    assert "relu minus matryoshka −" in said and "relu minus topk −" in said and "width 1k it is" not in said


def test_each_pair_of_architectures_stands_on_the_page_at_each_width():
    cells = [
        cell(arch, width, l0, table(0.1, draw=width + l0 + len(arch)))
        for arch in ("topk", "relu", "jumprelu") for width in (1024, 4096) for l0 in (8, 16)
    ]  # fmt: skip
    shown = [c for c in study_of(cells).of("arch") if not c.pooled and c.metric == "full"]
    pairs = [("topk", "relu"), ("topk", "jumprelu"), ("relu", "jumprelu")]
    assert {(c.ends, c.where.split(", ")[1]) for c in shown if c.question == "arch at L0"} == {
        (pair, width) for pair in pairs for width in ("width 1k", "width 4k")
    }


def test_cells_with_one_seed_take_no_claim_from_those_with_three():
    """Of two widths three seeds are there; a third width, or two of its L0, has one."""
    of = lambda width, l0: width / 1000 - l0 / 500  # noqa: E731
    two = grid({64: (8, 16, 32), 128: (8, 16, 32)}, of)
    one_more = [*two, *grid({256: (8, 16, 32)}, of, seeds=lambda width: 1)]
    wide, narrow = sorted(main_of(one_more, "width"), key=lambda c: c.verdict == HOLDS)
    assert (wide.ends, wide.verdict, wide.seeds) == (("64", "256"), FEW, (3, 1))
    assert (narrow.ends, narrow.verdict, narrow.where) == (("64", "128"), HOLDS, "topk, mean over L0 8, 16, 32")
    assert narrow.difference == main_of(two, "width")[0].difference

    mixed = [*two, *grid({256: (8, 32)}, of), *grid({256: (16,)}, of, seeds=lambda width: 1)]
    found = {(c.ends, c.where): c.verdict for c in main_of(mixed, "width")}
    assert found == {
        (("64", "256"), "topk, mean over L0 8, 32"): HOLDS,
        (("64", "128"), "topk, mean over L0 8, 16, 32"): HOLDS,
    }
    (fall,) = [c for c in main_of(mixed, "l0") if c.where.endswith("64, 128, 256")]
    assert (fall.ends, fall.verdict) == (("8", "32"), HOLDS)
    alone = [c for c in claims(mixed) if (c.question, c.metric, c.where) == ("l0", "full", "topk at width 256")]
    assert (("8", "32"), HOLDS) in [(c.ends, c.verdict) for c in alone]


def test_a_width_between_with_fewer_seeds_leaves_its_l0_in_the_mean_of_the_ends():
    of = lambda width, l0: width / 1000  # noqa: E731
    cells = grid({64: (8, 16), 128: (8,), 256: (8, 16)}, of) + grid({128: (16,)}, of, seeds=lambda width: 1)
    ends = [c for c in main_of(cells, "width") if c.ends == ("64", "256")]
    assert [(c.where, c.verdict) for c in ends] == [("topk, mean over L0 8, 16", HOLDS)]
    every = [(c.question, c.metric, c.where, c.ends) for c in claims(cells)]
    assert len(every) == len(set(every))


def test_splitting_is_judged_on_widths_with_enough_seeds_and_names_the_others():
    def said(counts: dict[int, float], seeds: dict[int, int]) -> str:
        return onset(claim_of([
            cell("topk", width, 8, table(0.1, seeds[width]), n_split=table(n, seeds[width], draw=width))
            for width, n in counts.items()
        ], "splitting", "n_split"))  # fmt: skip

    wide = said({64: 1.0, 128: 1.0, 256: 2.0}, {64: 3, 128: 3, 256: 1})
    assert "not seen to set in up to width 128 (not distinguishable)" in wide
    assert wide.endswith("; width 256 not judged: too few seeds.")
    narrow = said({64: 1.0, 128: 1.0, 256: 2.0}, {64: 1, 128: 3, 256: 3})
    assert "sets in at width 256" in narrow and "against 1.00 at 128" in narrow
    assert narrow.endswith("; width 64 not judged: too few seeds.")


def test_cells_of_other_seeds_are_named_where_architectures_are_compared_at_an_ev():
    cells = [cell("topk", 64, l0, table(0.1), ev=0.8 + l0 / 1000, words_l0=l0) for l0 in (8, 16)]
    cells += [cell("relu", 64, l0, table(0.2), ev=0.8 + l0 / 1000, words_l0=l0) for l0 in (8, 16)]
    cells += [cell("relu", 64, 32, table(0.2, 1), ev=0.84, words_l0=32)]
    for question in ("arch at EV", "arch at L0 on the words"):
        assert claim_of(cells, question).left == "without relu at L0 32: other or fewer training seeds"


def test_every_mean_has_its_parts_and_those_that_go_against_it_are_named():
    of = lambda width, l0: 0.3 + (0.0 if width == 64 else 0.2 if l0 > 8 else -0.1)  # noqa: E731
    cells = grid({64: (8, 16, 32), 128: (8, 16, 32), 256: (8, 16)}, of)
    rise = next(c for c in main_of(cells, "width") if c.ends == ("64", "128"))
    parts = [
        c for c in claims(cells) if (c.question, c.metric, c.ends, c.pooled) == ("width", "full", rise.ends, False)
    ]
    assert [c.where for c in parts] == ["topk at L0 8", "topk at L0 16", "topk at L0 32"]
    said = next(line for line in findings(study_of(cells))[0]["Width"] if "64 to 128" in line)
    assert "rises with width" in said and "But at L0 8 it falls (−0.100" in said


def test_a_pair_of_architectures_that_turns_round_at_a_width_says_so():
    of = {"topk": {64: 0.20, 128: 0.45}, "relu": {64: 0.50, 128: 0.40}, "matryoshka": {64: 0.05, 128: 0.05}}
    cells = [c for arch, means in of.items() for c in grid({64: (8,), 128: (8,)}, lambda w, l0, m=means: m[w], arch)]
    said = findings(study_of(cells))[1]["Pairs of architectures"][0]
    assert (
        said.startswith("Full absorption is more in relu than in topk")
        and "But at width 128 it is less in relu" in said
    )


@pytest.mark.parametrize(
    ("relu_at_128", "why"), [((), "was not trained"), ((12.0,), "was not compared")], ids=["absent", "missed"]
)
def test_where_the_least_of_all_is_absent_is_said_as_it_is(relu_at_128, why):
    of = {"topk": {64: 0.3, 128: 0.5}, "matryoshka": {64: 0.25, 128: 0.2}}
    cells = [c for arch, means in of.items() for c in grid({64: (8,), 128: (8,)}, lambda w, l0, m=means: m[w], arch)]
    cells += [cell("relu", 64, 8, table(0.1, draw=5))]
    cells += [cell("relu", 128, 8, table(0.1, draw=6), reached=reached) for reached in relu_at_128]
    said = least(study_of(cells), "L0")
    assert "relu has less full absorption than every other architecture" in said
    assert f"But at width 128, where relu {why}, it is matryoshka" in said and "at width 64" not in said


def test_what_a_mean_over_pairs_leaves_out_is_named_with_its_reason():
    cells = grid({64: (8, 16), 128: (8,)}) + grid({64: (8,), 128: (8,)}, arch="relu", of=lambda w, l0: 0.2)
    cells += [cell("relu", 64, 16, table(0.2, draw=3), reached=24.0)]
    cells += [cell(arch, 256, 8, table(0.2, draw=i), reached=8 * i) for i, arch in ((1, "topk"), (3, "relu"))]
    found = [c for c in claims(cells) if (c.question, c.metric, c.pooled) == ("arch at L0", "full", False)]
    assert [(c.where, c.left or c.how) for c in found] == [
        ("at the same L0, width 64, L0 8", "L0 16 not compared: relu, 64, L0 16 reached 24.0"),
        ("at the same L0, width 128, L0 8", "L0 as reached or interpolated"),
        ("at the same L0, width 256", "not compared: relu, 256, L0 8 reached 24.0"),
    ]
    assert "L0 16 not compared" in found[0].sentence


@pytest.mark.parametrize(("reached", "seeds", "why"), [(None, 1, FEW), (12.0, 3, "not compared: topk, 128, L0 8")])
def test_splitting_names_the_narrower_widths_that_were_not_judged(reached, seeds, why):
    counts = {64: 1.0, 128: 1.9, 256: 2.0}
    cells = [
        cell("topk", width, 8, table(0.1, 1 if width == 128 else 3), n_split=table(n, seeds if width == 128 else 3),
             **({"reached": reached} if width == 128 and reached else {}))
        for width, n in counts.items()
    ]  # fmt: skip
    said = onset(claim_of(cells, "splitting", "n_split"))
    assert "sets in at width 256" in said and f"width 128 {'not judged: ' if seeds == 1 else ''}{why}" in said


def test_letters_of_every_scored_sae_are_written_and_the_page_counts_seeds_as_they_are(tmp_path):
    """The last SAE was scored on other words, so that it is in no cell; another cell has one seed."""
    cells = [*grid({64: (8, 16), 128: (8,)}), *grid({128: (16,)}, seeds=lambda width: 1)]
    run = Run(tmp_path / "r", "r", {"settings": {}, "eval_assets": {"hash": "a"}}, [])
    run.saes.extend(replace(sae, run="r", name=f"{c.name}-{sae.seed}") for c in cells for sae in c.saes)
    other = Run(tmp_path / "o", "o", {"settings": {}, "eval_assets": {"hash": "b"}}, [])
    other.saes.extend(replace(sae, run="o", name="other") for sae in cell("topk", 256, 8, table(0.1, 1)).saes)
    again = Run(tmp_path / "r2", "r2", {"settings": {}, "eval_assets": {"hash": "a"}}, [])
    again.saes.extend(replace(sae, run="r2") for sae in run.saes[:3])
    study = read_study([run, other, again])
    page, _ = write_tables(study, tmp_path / "out")
    assert ", 1 to 3 training seeds, " in page.read_text()
    letters = (tmp_path / "out/letters.csv").read_text()
    assert letters.count("topk,64,8,0,a") == 1, "of an SAE that two runs have the letters stand once"
    assert "topk,256,8" in letters and "topk, 256, L0 8" not in {c.name for c in study.cells}
