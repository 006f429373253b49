"""The page on scale has the table of its script."""

from pathlib import Path

from benchmarks.kernels import scale

ROOT = Path(__file__).resolve().parents[1]


def test_the_page_has_the_script_s_table():
    sizes = [(width, gpus, 2304, 2048 * gpus) for gpus in (8, 64) for width in (2**17, 2**19, 2**20)]
    page = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    assert scale.table([scale.chosen(*each) for each in sizes]) in page


def test_a_team_of_all_gpus_averages_nothing_and_a_lone_gpu_sums_nothing():
    alone, team = (scale.Layout(2**17, 8, n, 2304, 2**14) for n in (1, 8))
    assert alone.moved()["sums"] == 0 and team.moved()["gradients"] == 0
    assert team.memory()["training"] == alone.memory()["training"] / 8
