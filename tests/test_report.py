"""The HTML report, on made-up run folders: what it says, what it survives, and that it is one safe page."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest

from sae_train.config import SAESpec, flat, resolve
from sae_train.errors import UserError
from sae_train.report import export_report, write_report
from sae_train.report.marks import nice_ticks

STEPS = (0, 4, 8, 16, 32, 64, 96, 128, 160, 192, 224, 245)
LETTERS = "abcdefghijklmnopqrstuvwxyz"
BATCH = 4096
VOID = {"meta", "br", "hr", "input", "img", "link"}


def fake_run(
    folder: Path, archs=("topk",), widths=(16384,), l0s=(50.0,), words: int = 900, seeds=(0,), **facts
) -> Path:
    """Write a plausible run: curves that saturate, absorption that rises with width and falls with L0."""
    import numpy as np
    import pandas as pd

    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    rows, tables, saes = [], [], []
    for spec in (SAESpec(arch=a, width=w, l0=t, seed=s) for a in archs for w in widths for t in l0s for s in seeds):
        level = min(0.9, 0.06 * math.log2(spec.width / 256) / math.log2(spec.l0 + 2) * 2)
        history = [_row(spec, step, level * (1 - math.exp(-step / 50)), rng) for step in STEPS]
        tables += [_letters(spec, step, level * (1 - math.exp(-step / 50)), rng) for step in STEPS]
        tables.append(_words(spec, level, rng, words))
        rows += history
        random = {"mean_fraction": 0.002, "mean_full": 0.0}
        sae = spec.model_dump() | {"name": spec.name, "failed": None, "baseline": {"random": random}}
        saes.append(sae | {"final": {k: v for k, v in history[-1].items() if "/" in k}})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pd.concat(tables, ignore_index=True).to_parquet(folder / "absorption.parquet")
    write_facts(folder, saes, **facts)
    return folder


def write_facts(folder: Path, saes: list[dict], **facts) -> None:
    content = {
        "settings": flat(
            resolve({"width": "16k", "hook": "blocks.1.hook_resid_post", "tokens": 1_003_520, "batch_tokens": BATCH})
        ),
        "versions": {"python": "3.11.2", "torch": "2.13.0"},
        "hardware": {"cpu": "x86_64", "cores": 2, "gpus": []},
        "git_commit": "0123456789ab",
        "command": "sae-train --width 16k --l0 50",
        "saes": saes,
        "notes": [],
        "seconds": 250.0,
        "tokens": STEPS[-1] * BATCH,
        "status": "finished",
    }
    (folder / "run.json").write_text(json.dumps(content | facts))


def _row(spec: SAESpec, step: int, level: float, rng) -> dict:
    done = 1 - math.exp(-step / 40)
    ev = done * (1 - 0.5 / spec.l0**0.5 - 0.2 / math.log2(spec.width))
    figures = {
        "losses/loss": 1 - ev + 0.02 * rng.random(),
        "metrics/l0": spec.l0
        if spec.arch == "topk"
        else spec.l0 * (1 + 6 * math.exp(-step / 15) + 0.02 * rng.random()),
        "metrics/explained_variance": ev,
        "metrics/ce_loss_score": min(1, 1.05 * ev),
        "sparsity/dead_features": int(spec.width * 0.12 * done),
        "absorption/mean_f1": 0.1 + 0.7 * done,
        "absorption/n_letters": 25,
        "absorption/valid": True,
        "absorption/seconds": 1.3,
    }
    for name, value in (("mean_fraction", level), ("mean_full", 0.8 * level)):
        low, high = max(0, value - 0.02), value + 0.025
        figures |= {
            f"absorption/{name}": value,
            f"absorption/{name}_low": low,
            f"absorption/{name}_high": high,
        }
    if spec.arch != "topk":
        figures["details/l0_coefficient"] = 0.01 * (1 + 3 * done)
    if spec.arch == "jumprelu":
        figures["details/threshold"] = 0.05 + 0.2 * done
    return {"sae": spec.name, "step": step, "tokens": step * BATCH, "seconds": step * 0.9} | figures


def _letters(spec: SAESpec, step: int, level: float, rng):
    import pandas as pd

    rows = []
    for i, letter in enumerate(LETTERS):
        fraction = float(min(1, max(0, level * rng.gamma(4, 0.25))))
        n_tp = int(rng.integers(5, 60))
        rows.append(
            {
                "letter": letter,
                "counts": letter != "x",
                "n_tp": n_tp,
                "fraction": fraction,
                "full": 0.8 * fraction,
            }
            | {
                "n_full": int(0.8 * fraction * n_tp),
                "n_split": 1 + i % 3,
                "main_latents": list(range(i, i + 1 + i % 3)),
            }
            | {"probe_f1": 0.4 if letter == "x" else 0.93, "f1_k1": 0.6, "f1_split": 0.7, "recall_main": 0.65}
        )
    return pd.DataFrame(rows).assign(level="letter", sae=spec.name, step=step, tokens=step * BATCH)


def _words(spec: SAESpec, level: float, rng, count: int):
    import pandas as pd

    rows = []
    for i in range(count):
        word = " " + LETTERS[i % 26] + "".join(rng.choice(list("aeiourstln"), size=1 + i % 7))
        absorbed, full = rng.random() < level, rng.random() < 0.8
        proj = [2.0 + rng.random(), 0.4] if absorbed else []
        rows.append(
            {
                "letter": LETTERS[i % 26],
                "word": word,
                "token_id": i,
                "a": 4.0,
                "main_latents": [i % 26, 90 + i % 26],
            }
            | {"fraction": (1.0 if full else 0.55) if absorbed else 0.0, "full": bool(absorbed and full)}
            | {"main_act": 0.0 if absorbed and full else 1.3, "absorber_proj": proj}
            | {"absorbers": [4000 + i // 40, 17][: len(proj)], "absorber_cos": [0.41, 0.12][: len(proj)]}
        )
    return pd.DataFrame(rows).assign(level="word", sae=spec.name, step=STEPS[-1], tokens=STEPS[-1] * BATCH)


class Page(HTMLParser):
    """Collects what the tests ask about, and fails on tags that do not nest."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.loads: list[str] = []
        self.tags: list[str] = []
        self.pieces: list[str] = []
        self.words: list = []
        self.feed(text)
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.loads += [value for name, value in attrs if name in ("src", "href", "srcset", "action", "data")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        if self.open[-1:] == ["script"]:
            self.words = self.words or (json.loads(data) if data.startswith("[") else [])
        elif self.open[-1:] != ["style"]:
            self.pieces.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", "".join(self.pieces))


def read(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


def test_one_run_gives_a_page_with_its_numbers_intervals_and_an_example(tmp_path):
    page = read(write_report(fake_run(tmp_path / "run")))
    for sentence in (
        "was trained on 1M tokens in 4 min 10 s. It was asked for L0 50 and reached 50.0 (0.0 % off).",
        "12.0 % dead latents among its 16,384",
        "Absorption is 0.125 (fraction; 95 % interval 0.105 to 0.150)",
        " and 0.100 (full; 95 % interval 0.080 to 0.125)",
        "over the 25 letters that count. A random SAE of the same width and L0",
        "scores 0.002 (fraction) and 0.000 (full)",
        "Its fraction is distinguishably above that; its full is distinguishably above that.",
        "fires instead (cosine 0.41 with the letter’s probe, and carries",
        "The letter latents have mean F1 0.80",
        "sae-train --width 16k --l0 50",
    ):
        assert sentence in page.text, sentence
    assert page.tags.count("select") == 0
    assert len(page.words[0]) > 50 and all(row[7] > 0 for row in page.words[0])
    assert [row[8] for row in page.words[0]] == [int(row[7] == 1) for row in page.words[0]]


def test_grid_shows_every_sae_a_chooser_and_heat_maps_with_numbers(tmp_path):
    run = fake_run(tmp_path / "grid", ("relu", "topk", "jumprelu"), (1024, 4096), (8.0, 32.0))
    page = read(write_report(run))
    names = [f"{a}-{w}-l0_{t}" for a in ("relu", "topk", "jumprelu") for w in ("1k", "4k") for t in (8, 32)]
    assert all(name in page.text for name in names)
    assert "12 of 12 reached their L0 within 2 %" in page.text
    assert "Distinguishable from 0: 12 of 12" in page.text
    assert page.tags.count("option") == 12
    text = (run / "report.html").read_text()
    cells = re.findall(r'<td style="--share:\d+%">([\d.]+)</td>', text)
    assert len(cells) == 3 * 12
    assert "0.143" in cells


def test_page_loads_nothing_and_stays_small(tmp_path):
    run = fake_run(tmp_path / "grid", ("relu", "topk"), (1024, 4096), (8.0, 32.0))
    path = write_report(run)
    assert read(path).loads == []
    text = path.read_text()
    assert not re.search(r"@import|url\((?!#)|https?://|import\s*\(|fetch\(", text)
    assert path.stat().st_size < 1_000_000


def test_large_grids_stay_under_ten_megabytes(tmp_path):
    run = fake_run(
        tmp_path / "big", ("relu", "topk", "jumprelu"), (1024, 4096, 16384, 65536), (8.0, 16.0, 32.0, 64.0), 300
    )
    assert write_report(run).stat().st_size < 10_000_000


def test_strings_from_the_run_never_become_markup(tmp_path):
    import pandas as pd

    run = fake_run(tmp_path / "run", words=30, notes=["a <b>note</b> & more"], command="x <script>alert(1)</script>")
    table = pd.read_parquet(run / "absorption.parquet")
    evil = '</script><img src=x onerror=alert(1)>"&'
    table.loc[table["level"].eq("word"), ["word", "fraction", "full"]] = [evil, 1.0, 1.0]
    filled = table["level"].eq("word") & table["absorbers"].map(lambda a: a is not None and len(a) == 0)
    for column, value in (("absorbers", [1]), ("absorber_cos", [0.3]), ("absorber_proj", [3.0])):
        table[column] = table[column].where(~filled, pd.Series([value] * len(table)))
    table.to_parquet(run / "absorption.parquet")
    path = write_report(run)
    page = read(path)
    assert "img" not in page.tags and page.tags.count("script") == 3
    assert page.words[0][0][0] == evil and f"on “{evil}”" in page.text
    assert "a <b>note</b> & more" in page.text and "x <script>alert(1)</script>" in page.text


def test_templates_and_charts_escape_whatever_is_put_into_them(tmp_path):
    from sae_train.report import render
    from sae_train.report.marks import Node

    assert render._environment().autoescape is True
    texts = [path.read_text() for path in (Path(render.__file__).parent / "templates").iterdir()]
    assert len(texts) > 4 and not any("|safe" in text or "| safe" in text or "autoescape" in text for text in texts)
    evil = '"><script>&'
    assert Node("text", evil, evil, x=1.0).__html__() == (
        '<text class="&#34;&gt;&lt;script&gt;&amp;" x="1.0">&#34;&gt;&lt;script&gt;&amp;</text>'
    )
    run = fake_run(tmp_path / "run", l0s=(8.0, 50.0), words=30)
    facts = json.loads((run / "run.json").read_text())
    for sae in facts["saes"]:
        sae["arch"], sae["failed"] = evil, None
    facts["settings"] |= {"hierarchy": f"{evil}-class", "preset": evil, "model": evil}
    (run / "run.json").write_text(json.dumps(facts))
    page = read(write_report(run))
    assert page.tags.count("script") == 3 and page.text.count("<script>&") > 4


def grow(run: Path) -> Path:
    """Give a run what newer evaluations hold: intervals and outcomes by letter, means of them, all baselines."""
    import pandas as pd

    table = pd.read_parquet(run / "absorption.parquet")
    letters, words = table["level"].eq("letter"), table["level"].eq("word")
    new = {"lost_carried": 0.2, "lost_below": 0.1, "lost_nobody": 0.05}
    bounds = {
        f"{name}_{end}": value for name in ("fraction", "full") for end, value in (("low", 0.012), ("high", 0.678))
    }
    for name, value in (new | bounds | {"full_family": 0.0432}).items():
        table.loc[letters, name] = value
    table.loc[words, "outcome"] = "carried"
    table.to_parquet(run / "absorption.parquet")
    facts = json.loads((run / "run.json").read_text())
    for sae in facts["saes"]:
        sae["final"] |= {f"absorption/mean_{name}": value for name, value in new.items()}
        sae["final"] |= {"absorption/mean_full_family": 0.0764, "absorption/mean_recall_main": 0.6543}
        sae["baseline"] |= {"shuffled_labels": {"mean_fraction": 0.111, "mean_full": 0.222}}
        sae["baseline"] |= {"probe": {"mean_fraction": 0.0, "mean_full": 0.0, "mean_f1": 0.988}}
    (run / "run.json").write_text(json.dumps(facts))
    return run


def test_family_corrected_rate_baselines_and_outcomes_are_shown_where_a_run_has_them(tmp_path):
    path = write_report(grow(fake_run(tmp_path / "run")))
    page, text = read(path), path.read_text()
    assert "takes away 24 % of the full rate and leaves 0.076" in page.text
    assert "0.111 / 0.222" in page.text and "shuffled labels" in page.text and "0.654" in page.text
    assert "main latents fire on 65.0 %. They miss 20.0 % because" in page.text
    assert re.search(r"<title>A, full: \d\.\d{3} \(0\.012 to 0\.678\)</title>", text)
    assert "<title>A, full, family-corrected: 0.043</title>" in text and "<title>A, nobody: 5.0\u00a0%</title>" in text
    assert page.words[0][0][9] == "carried" and 'data-column="outcome"' in text
    several = read(write_report(grow(fake_run(tmp_path / "grid", l0s=(8.0, 50.0))))).text
    assert "Where recall goes" in several


def test_labels_of_another_hierarchy_are_called_by_its_name(tmp_path):
    import pandas as pd

    run = fake_run(tmp_path / "run", words=30)
    facts = json.loads((run / "run.json").read_text())
    facts["settings"]["hierarchy"] = "hierarchies/word-class.json"
    (run / "run.json").write_text(json.dumps(facts))
    table = pd.read_parquet(run / "absorption.parquet")
    table["letter"] = table["letter"].replace({"a": "adjective", "b": "a name that is far too long for a margin"})
    table.to_parquet(run / "absorption.parquet")
    page = read(write_report(run))
    assert "over the 25 word classes that count" in page.text and "Absorption by word class" in page.text
    assert "F1 of the word class latents" in page.text and "a name that is far too …" in page.text


def test_older_runs_show_none_of_it(tmp_path):
    path = write_report(fake_run(tmp_path / "run"))
    text = read(path).text
    for absent in ("Where recall goes", "family", "shuffled labels", "Training seeds", "outcome", "They miss"):
        assert absent not in text, absent
    assert "Absorption, full, by letter" in text


def test_several_training_seeds_give_two_way_intervals_and_comparisons_of_neighbours(tmp_path):
    from sae_train.evals.intervals import letters_by_seeds, paired_difference

    run = fake_run(tmp_path / "run", widths=(1024, 4096), l0s=(8.0, 32.0), words=30, seeds=(0, 1, 2))
    text = write_report(run).read_text()
    cells = dict(re.findall(r'<tr><th scope="row">(topk[,:] .*?)</th>(.*?)</tr>', text, re.S))
    narrow, wide = _fractions(run, 1024, 8.0), _fractions(run, 4096, 8.0)
    assert narrow.shape == (3, 25)
    own = letters_by_seeds(narrow)
    assert f"{own.mean:.3f} <small>{own.low:.3f} to {own.high:.3f}</small>" in cells["topk, 1k, L0 8"]
    assert f"<td>{own.visible:.3f}</td>" in cells["topk, 1k, L0 8"]
    wider = paired_difference(wide, narrow)
    difference, judged = cells["topk: 4k − 1k, L0 8"].split("</td>")[2:4]
    assert f"{wider.mean:.3f} <small>{wider.low:.3f} to {wider.high:.3f}</small>" in difference
    assert (">distinguishable" in judged) is wider.excludes_zero
    assert len([name for name in cells if "−" in name]) == 4


def test_architectures_are_compared_at_matched_l0_or_the_reason_is_said(tmp_path):
    from sae_train.evals.intervals import paired_difference

    run = fake_run(tmp_path / "few", ("jumprelu", "topk"), (1024,), (8.0, 32.0), words=30)
    facts = json.loads((run / "run.json").read_text())
    for sae in facts["saes"]:
        sae["final"]["metrics/l0"] = sae["l0"] * (1.1 if (sae["arch"], sae["l0"]) == ("jumprelu", 32.0) else 1.0)
    (run / "run.json").write_text(json.dumps(facts))
    rows = _comparisons(run)
    assert rows["topk − jumprelu, 1k, L0 8"][:2] == ["1 + 1", "L0 as reached"]
    assert rows["topk − jumprelu, 1k, L0 32"][1:4] == ["not compared: L0 10.0\u00a0% apart", "–", "–"]

    run = fake_run(tmp_path / "many", ("jumprelu", "topk"), (1024,), (4.0, 8.0, 16.0, 32.0), words=30)
    facts = json.loads((run / "run.json").read_text())
    for sae in facts["saes"]:
        sae["final"]["metrics/l0"] = sae["l0"] * (1.1 if (sae["arch"], sae["l0"]) == ("jumprelu", 16.0) else 1.0)
    (run / "run.json").write_text(json.dumps(facts))
    low, high = (_fractions(run, 1024, l0, "jumprelu", 1) for l0 in (8.0, 16.0))
    share = math.log(16 / 8) / math.log(17.6 / 8)
    expected = paired_difference(_fractions(run, 1024, 16.0, "topk", 1), (1 - share) * low + share * high)
    row = _comparisons(run)["topk − jumprelu, 1k, L0 16"]
    assert row[1] == "L0 interpolated" and row[2].startswith(f"{expected.mean:.3f} <small>{expected.low:.3f}")


def test_architectures_are_compared_at_the_same_ev_where_both_reach_it(tmp_path):
    from sae_train.evals.intervals import paired_difference

    run = fake_run(tmp_path / "run", ("jumprelu", "topk"), (1024,), (8.0, 32.0), words=30)
    facts = json.loads((run / "run.json").read_text())
    ev = {("jumprelu", 8.0): 0.7, ("jumprelu", 32.0): 0.9, ("topk", 8.0): 0.75, ("topk", 32.0): 0.95}
    for sae in facts["saes"]:
        sae["final"]["metrics/explained_variance"] = ev[sae["arch"], sae["l0"]]
    (run / "run.json").write_text(json.dumps(facts))
    low, high = (_fractions(run, 1024, l0, "topk", 1) for l0 in (8.0, 32.0))
    expected = paired_difference(0.25 * low + 0.75 * high, _fractions(run, 1024, 32.0, "jumprelu", 1))
    rows = {name: row for name, row in _comparisons(run).items() if "EV" in name}
    assert list(rows) == ["topk − jumprelu, 1k, EV 0.900 (jumprelu at L0 32)"]  # .7 is below all of topk's
    row = rows.popitem()[1]
    assert row[1] == "EV interpolated" and row[2].startswith(f"{expected.mean:.3f} <small>{expected.low:.3f}")


def _comparisons(run: Path) -> dict[str, list[str]]:
    table = write_report(run).read_text().split("Distinguishable or not", 1)[1].split("</table>")[0]
    rows = re.findall(r'<tr><th scope="row">(.*?)</th>(.*?)</tr>', table, re.S)
    return {name: re.findall(r"<td[^>]*>(.*?)</td>", cells, re.S) for name, cells in rows}


def _fractions(run: Path, width: int, l0: float, arch: str = "topk", seeds: int = 3):
    """Seeds × letters that count, at the last step."""
    import pandas as pd
    import torch

    table = pd.read_parquet(run / "absorption.parquet")
    table = table[table["level"].eq("letter") & table["step"].eq(STEPS[-1]) & table["counts"].eq(True)]
    names = [SAESpec(arch=arch, width=width, l0=l0, seed=seed).name for seed in range(seeds)]
    rows = [table[table["sae"] == name].sort_values("letter")["fraction"].tolist() for name in names]
    return torch.tensor(rows, dtype=torch.float64)


def test_runs_of_other_lengths_or_models_are_no_further_seeds(tmp_path):
    def trained(name: str, seed: int, tokens: int) -> Path:
        run = fake_run(tmp_path / name, words=30, seeds=(seed,))
        facts = json.loads((run / "run.json").read_text())
        facts["settings"]["tokens"] = tokens
        (run / "run.json").write_text(json.dumps(facts))
        return run

    first, longer, second = trained("first", 0, 1000), trained("longer", 1, 9000), trained("second", 1, 1000)
    assert "Training seeds" not in read(write_report([first, longer])).text
    assert "Training seeds" in read(write_report([first, longer, second])).text


def test_interval_that_includes_zero_is_not_distinguishable(tmp_path):
    run = fake_run(tmp_path / "run")
    _edit_final(run, **{"absorption/mean_full_low": 0.0, "absorption/mean_fraction_low": 0.001})
    text = read(write_report(run)).text
    assert "(full; 95 % interval 0.000 to 0.125, not distinguishable from 0)" in text
    assert "Its fraction is not distinguishably above that; its full is not distinguishably above that." in text


def test_invalid_absorption_shows_its_reason_instead_of_a_score(tmp_path):
    run = fake_run(tmp_path / "run")
    _edit_final(run, **{"absorption/valid": False, "absorption/reason": "only 7 letters count, 20 are needed"})
    page = read(write_report(run))
    assert "There is no valid absorption score: only 7 letters count, 20 are needed." in page.text
    assert "0.125" not in page.text.split("Absorption by letter")[0]


def _edit_final(run: Path, **figures) -> None:
    facts = json.loads((run / "run.json").read_text())
    facts["saes"][0]["final"] |= figures
    (run / "run.json").write_text(json.dumps(facts))


def test_runs_are_compared_on_one_page(tmp_path):
    runs = [fake_run(tmp_path / "first"), fake_run(tmp_path / "second", l0s=(20.0,))]
    path = write_report(runs)
    page = read(path)
    assert path == tmp_path / "first" / "comparison.html"
    assert "first · topk-16k-l0_50" in page.text and "second · topk-16k-l0_20" in page.text
    assert "2 SAEs of 2 runs" in page.text
    assert not (tmp_path / "first" / "report.html").exists()


def test_a_run_without_absorption_or_with_one_row_or_none_gets_sentences(tmp_path):
    run = fake_run(tmp_path / "run", status="running", tokens=8192)
    (run / "absorption.parquet").unlink()
    first = (run / "metrics.jsonl").read_text().splitlines()[0]
    (run / "metrics.jsonl").write_text(first + '\n{"sae": "topk-16k-l0')
    text = read(write_report(run)).text
    assert "Still running: run was at work after 8.19k of 1M tokens" in text
    assert "absorption.parquet is absent" in text and "1 unreadable row(s)" in text
    (run / "metrics.jsonl").unlink()
    write_facts(run, [{"name": "topk-16k-l0_50"}])
    text = read(write_report(run)).text
    assert "no curves" in text and "Absorption was not evaluated." in text
    write_facts(run, [], settings=None, versions=None, hardware="a box", seconds=None, tokens=None, notes=None)
    assert "No SAE has left anything yet." in read(write_report(run)).text
    (run / "absorption.parquet").write_bytes(b"PAR1 and then nothing")
    assert "absorption.parquet cannot be read" in read(write_report(run)).text


def test_what_was_looked_at_once_has_no_course_to_draw(tmp_path):
    run = fake_run(tmp_path / "run")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for row in rows[:-1]:
        for name in [name for name in row if name.startswith("absorption/")]:
            del row[name]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    drawn = re.findall(r'<svg class="plot"[^>]*aria-label="([^"]*)"', write_report(run).read_text())
    assert "Loss" in drawn and "L0" in drawn
    assert not [title for title in drawn if "bsorption" in title or "letter" in title]


def test_settings_without_a_value_are_left_out(tmp_path):
    assert "gpus" not in read(write_report(fake_run(tmp_path / "run"))).text


@pytest.mark.parametrize("low", [0.0, 0.994, -3.0, 17.0])
@pytest.mark.parametrize("span", [1e-3, 0.0021, 0.24, 0.63, 1.0, 7.7, 3000.0])
@pytest.mark.parametrize("count", [3, 4, 5])
def test_an_axis_has_at_least_three_round_numbers(low, span, count):
    ticks = nice_ticks(low, low + span, count)
    steps = {round((b - a) / span, 6) for a, b in pairwise(ticks)}
    assert 3 <= len(ticks) <= 3 * count and len(steps) == 1
    assert low - 1e-9 <= ticks[0] and ticks[-1] <= low + span + 1e-9
    step = ticks[1] - ticks[0]
    assert round(step / 10 ** math.floor(math.log10(step) + 1e-9), 6) in (1, 2, 5)


def test_a_failed_sae_is_named_with_its_reason_beside_the_others(tmp_path):
    run = fake_run(tmp_path / "run", l0s=(50.0, 20.0))
    facts = json.loads((run / "run.json").read_text())
    facts["saes"][1] |= {"failed": "step 12: loss is nan", "final": {"losses/loss": None}}
    (run / "run.json").write_text(json.dumps(facts))
    text = read(write_report(run)).text
    assert "1 failed: topk-16k-l0_20 (step 12: loss is nan)" in text
    assert "topk-16k-l0_20 failed and was left out from then on" in text


def test_nan_and_infinity_in_the_metrics_are_left_out(tmp_path):
    run = fake_run(tmp_path / "run")
    text = (run / "metrics.jsonl").read_text()
    rows = text + '{"sae":"topk-16k-l0_50","step":300,"tokens":1228800,"losses/loss":NaN,"metrics/l0":Infinity}\n'
    (run / "metrics.jsonl").write_text(rows)
    svg = "".join(re.findall(r"<svg.*?</svg>", write_report(run).read_text(), re.S))
    assert "nan" not in svg and "inf" not in svg


@pytest.mark.parametrize("content", [None, "", "{half", "[]", '{"name": "another tool"}'])
def test_a_folder_that_is_no_run_is_a_user_error(tmp_path, content):
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    with pytest.raises(UserError):
        write_report(tmp_path)


def test_a_missing_folder_and_an_unwritable_page_are_user_errors(tmp_path):
    with pytest.raises(UserError, match="not a folder"):
        write_report(tmp_path / "absent")
    run = fake_run(tmp_path / "run", words=30)
    with pytest.raises(UserError, match="cannot be written"):
        write_report(run, out=run / "run.json" / "report.html")
    assert write_report(run, out=tmp_path / "new" / "page.html").is_file()


def test_export_writes_every_figure_as_png_svg_and_csv_and_the_tables(tmp_path):
    import pandas as pd

    run = fake_run(tmp_path / "run", ("topk", "relu"), (1024,), words=30)
    written = export_report([run], tmp_path / "out")
    figures = {path.with_suffix("") for path in written if path.suffix == ".png"}
    assert {path.with_suffix("") for path in written if path.suffix == ".svg"} == figures
    names = {str(path.relative_to(tmp_path / "out")) for path in figures}
    assert {"training/loss", "width-and-l0/full-l0", "width-and-l0/full-ev"} <= names
    assert "saes/relu-1k-l0_50/fraction-by-label" in names
    assert all(path.with_name(f"{path.name}.csv") in written for path in figures)
    curve = pd.read_csv(tmp_path / "out" / "training" / "fraction.csv")
    history = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    expected = [row["absorption/mean_fraction"] for row in history if row["sae"] == "relu-1k-l0_50"]
    assert curve[curve["sae"] == "relu-1k-l0_50"]["fraction"].tolist() == pytest.approx(expected)
    table = pd.read_csv(tmp_path / "out" / "saes.csv")
    assert len(table) == 2 and table["metrics/explained_variance"].notna().all()
    assert len(pd.read_csv(tmp_path / "out" / "letters.csv")) == 2 * 26 * len(STEPS)
    with pytest.raises(UserError, match="cannot be written"):
        export_report([run], run / "run.json" / "out")


def test_the_picture_for_cards_has_a_panel_a_figure_and_the_names_of_the_saes(tmp_path):
    import matplotlib.image

    from sae_train.publishing.curves import write_curves

    run = fake_run(tmp_path / "run", ("topk", "relu"), (1024,), words=30)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    heights = []
    for name, kept in (("none", []), ("one", rows), ("fewer", [_without_absorption(row) for row in rows])):
        write_curves(kept, tmp_path / f"{name}.png")
        heights.append(len(matplotlib.image.imread(tmp_path / f"{name}.png")))
    assert heights[0] < heights[2] < heights[1]


def _without_absorption(row: dict) -> dict:
    return {name: value for name, value in row.items() if not name.startswith("absorption")}


def follow(run: Path) -> Path:
    """Give a run what newer ones hold: words at every evaluation, pages of latents, a density histogram."""
    import pandas as pd

    words = pd.read_parquet(run / "absorption.parquet").query("level == 'word'")
    taken = words["fraction"].astype(float) > 0
    parts = []
    for step in STEPS:
        outcome = ["carried" if t and step >= 96 else "recalled" for t in taken]
        absorber = [int(a[0]) if len(a) else -1 for a in words["absorbers"]]
        part = words[["sae", "letter", "word", "token_id"]].assign(
            step=step, tokens=step * BATCH, outcome=outcome, main_act=1.0
        )
        parts.append(part.assign(share=0.8, absorber=absorber, absorber_cos=0.4))
    pd.concat(parts, ignore_index=True).to_parquet(run / "trajectory.parquet")
    facts = json.loads((run / "run.json").read_text())
    (run / "latents").mkdir()
    for sae in facts["saes"]:
        counts = [1, 2, 3, 4, 5, 4, 3, 2, 1, 0]
        sae["final"] |= {"sparsity/silent_fraction": 0.25, "sparsity/log10_density_histogram": counts}
        example = {"kind": "top", "tokens": [" <b>a ", " word"], "acts": [0, 2.5]}
        record = {"latent": 4000, "main_of": [], "absorbs": [" a<i>"], "density": 0.01, "max": 2.5}
        record |= {"histogram": [1, 0, 2], "examples": [example], "top": [[" x", 1.5]], "bottom": []}
        (run / "latents" / f"{sae['name']}.jsonl").write_text(json.dumps(record))
    (run / "run.json").write_text(json.dumps(facts))
    return run


def test_the_event_log_stands_in_the_panel_and_beside_each_word(tmp_path):
    path = write_report(follow(fake_run(tmp_path / "run")))
    page, text = read(path), path.read_text()
    n = len(page.words[0])
    assert f"{n} words are carried by another latent in the end. {n} of them had been recalled" in page.text
    assert "the letter’s latents had fallen silent for good on half by 393k tokens" in page.text
    assert f"<title>at 393k tokens: {n}</title>" in text and "<title>at 1M tokens: 0</title>" in text
    assert page.words[0][0][11] == [64 * BATCH, 96 * BATCH, 96 * BATCH]
    assert 'data-column="silent"' in text and 'data-column="taken"' in text


def test_latents_have_pages_whose_strings_never_become_markup(tmp_path):
    path = write_report(follow(fake_run(tmp_path / "run")))
    page, text = read(path), path.read_text()
    held = json.loads(re.search(r'<script type="application/json" id="latents">(.*?)</script>', text, re.S)[1])
    assert held[0][0][:3] == [4000, [], [" a<i>"]] and held[0][0][6] == [["top", [" <b>a ", " word"], [0, 2.5]]]
    assert "<b>a " not in text and "a<i>" not in text and 'id="cards"' in text
    assert "How often latents fire" in page.text and "4,096 that never do there" in page.text


def test_many_saes_share_the_room_for_contexts(tmp_path, monkeypatch):
    from sae_train.report import latents

    monkeypatch.setattr(latents, "EXAMPLES", 2)
    run = follow(fake_run(tmp_path / "run", l0s=(8.0, 50.0), words=30))
    for path in (run / "latents").iterdir():
        record = json.loads(path.read_text())
        path.write_text(json.dumps(record | {"examples": 5 * record["examples"]}))
    text = write_report(run).read_text()
    held = json.loads(re.search(r'id="latents">(.*?)</script>', text, re.S)[1])
    assert [len(row[6]) for own in held for row in own] == [1, 1]


def test_trade_offs_have_a_line_an_architecture_with_the_l0_that_was_reached(tmp_path):
    run = fake_run(tmp_path / "run", ("topk", "relu"), (1024, 4096), (8.0, 32.0))
    text = write_report(run).read_text()
    assert "Full absorption against L0" in text and "Explained variance against L0" in text
    assert re.search(r"<title>relu-1k-l0_32: explained variance 0\.\d+, L0 32\.\d</title>", text)
    alone = read(write_report(fake_run(tmp_path / "alone"))).text
    assert "against L0" not in alone


def test_the_answer_comes_first_in_plain_words(tmp_path):
    text = read(write_report(fake_run(tmp_path / "run", l0s=(8.0, 50.0)))).text
    body = text[text.index("Does a latent that stands for a first letter fire on every word with that letter?") :]
    share = "absorbed on 10.0 % of a letter’s words, on average (95 % interval over words 8.0 % to 12.5 %)"
    assert body.index(f"topk-16k-l0_50: {share}") < 400
    assert "distinguishably more than a random SAE gives (0.0 %)" in body
    assert "What the words mean" in body


def test_the_answer_names_the_random_sae_that_scores_higher(tmp_path):
    """Nearly silent on the words, the one fitted on text would make any score look large."""
    run = fake_run(tmp_path / "run", l0s=(8.0, 50.0))
    facts = json.loads((run / "run.json").read_text())
    for sae in facts["saes"]:
        sae["baseline"]["random_words"] = {"mean_full": 0.3, "mean_fraction": 0.3}
    (run / "run.json").write_text(json.dumps(facts))
    assert "not distinguishably more than a random SAE gives (30.0 %)" in read(write_report(run)).text


def test_an_upper_bound_of_zero_is_a_bound(tmp_path):
    run = fake_run(tmp_path / "run", l0s=(8.0, 50.0), words=30)
    facts = json.loads((run / "run.json").read_text())
    facts["saes"][1]["final"] |= {f"absorption/mean_full{end}": 0.0 for end in ("", "_low", "_high")}
    (run / "run.json").write_text(json.dumps(facts))
    text = read(write_report(run)).text
    assert "Absorption (full) goes from 0.000 (topk-16k-l0_50, 0.000 to 0.000)" in text
    assert "even these two are not" not in text


def test_watch_serves_the_page_anew_once_the_run_has_logged_more(tmp_path):
    import threading
    import urllib.error
    import urllib.request

    from sae_train.report.watch import serve

    run = fake_run(tmp_path / "run", words=30, status="running")
    with serve(run, 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/"
        get = lambda: urllib.request.urlopen(url, timeout=20).read().decode()  # noqa: E731
        first = get()
        assert "Still running" in first and 'http-equiv="refresh"' in first
        server.RequestHandlerClass.args[0]._next = 0.0  # as if some time had passed
        facts = json.loads((run / "run.json").read_text())
        (run / "run.json").write_text(json.dumps(facts | {"status": "finished"}))
        last = get()
        assert "Still running" not in last and 'http-equiv="refresh"' not in last
        with pytest.raises(urllib.error.HTTPError):
            urllib.request.urlopen(f"{url}../run.json", timeout=20)
        with pytest.raises(UserError, match="choose another --port"):
            serve(run, server.server_port)
        server.shutdown()
    with pytest.raises(UserError, match="not a folder"):
        serve(tmp_path / "absent", 0)
