"""The report: what is in it, where its data comes from, and that a broken run is named."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from PIL import Image

from smolora import cli
from smolora.evaluate import paper
from smolora.report import figures, tables, write_report
from smolora.report.layout import read_runs

MATRIX = [[80.0], [70.0, 60.0], [50.0, 40.0, 150.0]]
TASKS = ["ScienceQA", "TextVQA", "Flickr30k"]


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_one_run(one):
    text = (one / "report.md").read_text()
    assert "| smolora | single | 50.00 | 40.00 | 150.00 | 80.00 |" in text  # accuracies and AP
    assert "-25.00" in text  # BWT: ((50 - 80) + (40 - 60)) / 2
    assert "torch 2.13.0" in text
    pictures = {"accuracy.png", "matrices.png", "routing-smolora.png", "shares-smolora.png"}
    assert {picture.name for picture in one.glob("*.png")} == pictures
    for picture in pictures:
        assert f"({picture})" in text and (one / picture).with_suffix(".csv").is_file()


def test_every_figure_has_its_data_beside_it(one, two, several):
    for folder in (one, two, several):
        pictures = list(folder.glob("*.png"))
        assert len(pictures) >= 4 and (folder / "report.md").read_text().count(".png)") >= len(pictures)
        for picture in pictures:
            assert len(read_csv(picture.with_suffix(".csv"))) > 1, picture


def test_csv_holds_what_the_figures_show(one):
    found = {(row["task"], int(row["stage"])): float(row["accuracy"]) for row in read_csv(one / "accuracy.csv")}
    assert found == {(TASKS[j], k + 1): value for k, row in enumerate(MATRIX) for j, value in enumerate(row)}
    assert len(read_csv(one / "matrices.csv")) == 6
    shares = read_csv(one / "routing-smolora.csv")
    assert len(shares) == 3 * 2 * 4  # tasks, branches, experts
    for task in TASKS:
        for branch in ("vu", "if"):
            of_task = [float(row["share"]) for row in shares if (row["task"], row["branch"]) == (task, branch)]
            assert sum(of_task) == pytest.approx(1)


def test_mean_ratio_is_that_of_the_data(one):
    alphas = [float(row["alpha"]) for row in read_csv(one / "shares-smolora.csv")]
    alpha = np.mean(alphas)
    expected = f"alpha {alpha:.3f}, beta {1 - alpha:.3f}, ratio {alpha / (1 - alpha):.3f}"
    assert len(alphas) == 9 and expected in (one / "report.md").read_text()


def test_figures_do_not_depend_on_colour(two):
    for picture in two.glob("*.png"):
        pixels = np.asarray(Image.open(picture).convert("RGB")).astype(int)
        assert np.ptp(pixels, axis=2).max() <= 2, picture  # every pixel is grey
        assert pixels.min() < 50  # and something is drawn


def test_runs_side_by_side(two):
    rows = read_csv(two / "final.csv")
    assert [row["run"] for row in rows] == ["smolora", "seqlora"]  # three tasks: no rows of the paper
    assert {row["run"] for row in read_csv(two / "accuracy.csv")} == {"smolora", "seqlora"}
    assert len(list(two.glob("routing-*.png"))) == 1  # seqlora has no routes


def test_the_papers_rows(make_run, tmp_path):
    ours = make_run("a", paper.TABLE_6["single"], tasks=list(paper.UPSTREAM))
    other = make_run("b", paper.TABLE_5["single"], tasks=list(paper.UPSTREAM), method="seqlora")
    tables.final_table(tmp_path / "final.csv", read_runs([ours, other]))
    rows = read_csv(tmp_path / "final.csv")
    published = [f"{method}, paper" for method in paper.TABLE_1["single"]]
    assert [row["run"] for row in rows] == [*published, "smolora", "seqlora"]
    printed = next(row for row in rows if row["run"] == "SMoLoRA, paper")
    assert float(rows[-2]["BWT"]) == pytest.approx(float(printed["BWT"]), abs=0.0101)
    assert float(rows[-2]["Flickr30k"]) == float(printed["Flickr30k"])


@pytest.mark.parametrize("change", [{"benchmark": "MiniCVIT"}, {"protocol": "standard"}])
def test_the_papers_rows_stand_beside_comparable_runs_alone(make_run, tmp_path, change):
    folder = make_run("a", paper.TABLE_6["single"], tasks=list(paper.UPSTREAM), **change)
    assert "paper" not in tables.final_table(tmp_path / "final.csv", read_runs([folder]))


def test_figures_against_the_number_of_experts(make_run, tmp_path):
    folders = [make_run(f"e{n}", [[80.0], [70.0 + n, 60.0], [50.0, 40.0 + n, 150.0]], experts=n) for n in (2, 4, 8)]
    runs = read_runs(folders)
    figures.over_experts(tmp_path / "experts.png", runs)
    rows = [row for row in read_csv(tmp_path / "experts.csv") if row["figure"] == "AP"]
    assert [int(row["experts"]) for row in rows] == [2, 4, 8]
    assert float(rows[0]["value"]) == pytest.approx((50 + 42 + 150) / 3)
    assert [run.name for run in runs] == ["smolora (e2)", "smolora (e4)", "smolora (e8)"]


def test_runs_of_different_sizes_are_drawn_against_each_other(several):
    assert "(experts.png)" in (several / "report.md").read_text()
    rows = [row for row in read_csv(several / "experts.csv") if row["figure"] == "MIF"]
    assert [(row["experts"], row["value"]) for row in rows] == [("2", "90.0"), ("4", "90.0")]
    assert {path.name for path in several.glob("routing-*.png")} == {"routing-smolora-e2.png", "routing-smolora-e4.png"}


def test_downstream(make_run, tmp_path):
    accuracy = {"folder": "downstream-zero-shot", "tasks": list(paper.ZERO_SHOT), "accuracy": [30.0, 20.0, 40.0]}
    folder = make_run("a", MATRIX, downstream={"zero-shot": {**accuracy, "mif": [90.0] * 3, "AP": 30.0, "MIF": 90.0}})
    tables.downstream_tables(tmp_path, read_runs([folder]))
    rows = read_csv(tmp_path / "downstream-zero-shot.csv")
    assert [row["run"] for row in rows] == [f"{method}, paper" for method in paper.TABLE_2["single"]] + ["smolora"]
    assert rows[-1]["AP"] == "30.0"


def test_a_single_row(make_run):
    text = write_report([make_run("a", [[10.0, 20.0, 30.0]], method="zeroshot")]).read_text()
    assert "| zeroshot | single | 10.00 | 20.00 | 30.00 | 20.00 | - | - | 90.00 |" in text


def test_cases(two):
    rows = read_csv(two / "cases.csv")
    first = [row for row in rows if row["task"] == "ScienceQA"]
    assert first[0]["question_id"] == "1"  # where answers differ
    assert {row["run"]: row["answer"] for row in first if row["question_id"] == "1"} == {
        "smolora, after 1-ScienceQA": "stage-1-ScienceQA smolora",
        "smolora, at the end": "stage-3-Flickr30k smolora",
        "seqlora, after 1-ScienceQA": "stage-1-ScienceQA seqlora",
        "seqlora, at the end": "stage-3-Flickr30k seqlora",
    }
    # the last task's own stage is the end
    assert {row["run"] for row in rows if row["task"] == "Flickr30k"} == {"smolora, at the end", "seqlora, at the end"}
    text = (two / "report.md").read_text()
    assert "Briefly \\| please." in text and "yes; no" in text  # a table in spite of what is in the texts
    assert "no image" in text
    pictures = sorted(picture.name for picture in (two / "cases").iterdir())
    assert pictures == [f"{task}-{i}.png" for task in ("Flickr30k", "ScienceQA", "TextVQA") for i in (0, 1)]
    assert Image.open(two / "cases" / pictures[0]).size == (320, 240)
    assert f"(cases/{pictures[0]})" in text


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda c: c.pop("stages"), "lacks stages"),
        (lambda c: c["stages"].pop(), "stages must name 3 folders, got 2"),
        (lambda c: c["matrix"][1].pop(), r"AP of stage 2 is 65.0, but None by the matrix"),
        (lambda c: c["matrix"][1].append(1.0), "matrix, row 2: must have 2 cells, got 3"),
        (lambda c: c["AP"].__setitem__(1, 1.0), r"AP of stage 2 is 1.0, but 65.0 by the matrix"),
    ],
)
def test_broken_runs_are_named(make_run, change, match):
    folder = make_run("a", MATRIX)
    content = json.loads((folder / "results.json").read_text())
    change(content)
    (folder / "results.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=match):
        write_report([folder])


def test_means_over_seeds(make_run, tmp_path):
    """Runs that differ in the seed alone, by hand: 50, 40, 150 and 60, 40, 170 after the last stage."""

    def run(name: str, seed: int, last: list[float], **adapter) -> Path:
        config = {"seed": seed, "output": name, "adapter": {"r": 8, **adapter}}
        folder = make_run(name, [[80.0], [70.0, 60.0], last], config=config)
        results = json.loads((folder / "results.json").read_text())
        (folder / "results.json").write_text(json.dumps({**results, "name": "small"}))
        return folder

    runs = [run("a", 0, [50.0, 40.0, 150.0]), run("b", 1, [60.0, 40.0, 170.0]), run("c", 2, [0.0, 0.0, 0.0], r=9)]
    text = write_report(runs, tmp_path / "out").read_text()
    assert "| small | smolora | single | 0, 1 | 55.00 ± 7.07 | 40.00 ± 0.00 | 160.00 ± 14.14 | 85.00 ± 7.07 |" in text
    rows = {row["figure"]: row for row in read_csv(tmp_path / "out/seeds.csv")}
    assert float(rows["AP"]["mean"]) == 85 and float(rows["AP"]["standard deviation"]) == pytest.approx(50**0.5)
    assert rows.keys() == {*TASKS, "AP", "MAP", "BWT", "MIF"}
    assert "recipe small, seed 1" in text and "captions weigh most" in text
    text = write_report([runs[0], runs[2]], tmp_path / "alone").read_text()
    assert "Over seeds" not in text and not (tmp_path / "alone/seeds.csv").exists()


def test_command(make_run, capsys, tmp_path):
    folder = make_run("a", [[10.0, 20.0, 30.0]], method="zeroshot")
    assert cli.main(["report", str(folder), "--output", str(tmp_path / "out")]) == 0
    *table, path = capsys.readouterr().out.splitlines()
    assert path == str(tmp_path / "out" / "report.md")
    assert table[0] == "After the last stage" and any("20.00" in line for line in table)
    assert cli.main(["report", str(tmp_path)]) == 1
    assert "is no finished run: it has no results.json" in capsys.readouterr().err
    assert cli.main(["report", str(folder), "--cases", "-1"]) == 1


def test_command_shows_so_many_cases(make_run, tmp_path):
    runs = [str(make_run(name, MATRIX, method=name)) for name in ("seqlora", "smolora")]
    assert cli.main(["report", *runs, "--cases", "2", "--output", str(tmp_path / "out")]) == 0
    rows = read_csv(tmp_path / "out" / "cases.csv")
    for task in TASKS:
        assert len({row["question_id"] for row in rows if row["task"] == task}) == 2
    assert "## Cases" in (tmp_path / "out" / "report.md").read_text()
    assert cli.main(["report", *runs, "--output", str(tmp_path / "without")]) == 0
    assert "## Cases" not in (tmp_path / "without" / "report.md").read_text()


NASTY = "a | b \\| c\r\n<img src=x> *d* _e_ `f` $g$ [h](i) \x1b[31m"


def test_whatever_people_wrote_shows_as_it_is(make_run, tmp_path):
    """Questions, answers, truths, names of folders, tasks and tables: none of it is markup, a formula or a column."""
    tasks = ["one", "t | w $x_1$ o", "*three*"]
    run = make_run("a $1_2$ | *b*", MATRIX, tasks=tasks)
    other = make_run("a 1 2 b", MATRIX, tasks=tasks)
    for folder in (run, other):
        results = json.loads((folder / "results.json").read_text())
        for stage in results["stages"]:
            for path in (folder / stage / "answers").glob("*.jsonl"):
                lines = [{"question_id": i, "text": NASTY} for i in range(3)]
                path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        table = {"folder": "d", "tasks": ["x | y"], "accuracy": [1.0], "mif": [1.0], "AP": 1.0, "MIF": 1.0}
        (folder / "results.json").write_text(json.dumps({**results, "downstream": {"a/../b | c": table}}))
    questions = tmp_path / "data/one.json"
    records = json.loads(questions.read_text())
    for record in records:
        record.update(text=NASTY, answer=[NASTY, "no"])
    questions.write_text(json.dumps(records))
    page = write_report([run, other], tmp_path / "out", cases_per_task=3).read_bytes().decode()
    parser = pytest.importorskip("markdown_it").MarkdownIt("commonmark", {"html": True}).enable("table")
    html = parser.render(page)
    assert "<img src=x>" not in html and "<em>" not in html and "\x1b" not in html and "<a href" not in html
    rows = [row for row in re.findall("<tr>(.*?)</tr>", html, re.S) if "src=x" in row]
    assert rows and {len(re.findall("<td", row)) for row in rows} <= {5, 7}
    assert len(list((tmp_path / "out").glob("routing-*.png"))) == 2, "names that are alike keep files of their own"
    assert (tmp_path / "out/downstream-a-..-b - c.csv").is_file()
    for row in read_csv(tmp_path / "out/cases.csv"):
        assert len(row) == 6 and None not in row and "\r" not in "".join(row.values())


def test_names_of_pictures_can_be_followed(make_run, tmp_path):
    run = make_run("a", [[10.0, 20.0]], method="zeroshot", tasks=["Places365, 5-shot", "VQAv2"])
    text = write_report([run], tmp_path / "out", cases_per_task=1).read_text()
    links = [unquote(link) for link in re.findall(r"\]\((cases/[^) ]+)\)", text)]
    assert len(links) == 2 and all((tmp_path / "out" / link).is_file() for link in links)


def test_a_picture_that_is_broken_since_is_told_in_its_place(make_run, tmp_path):
    run = make_run("a", MATRIX)
    (tmp_path / "data/x.png").write_bytes(b"nothing")
    text = write_report([run], tmp_path / "out", cases_per_task=1).read_text()
    assert "x.png is no image that Pillow knows" in text


def test_layers_and_tasks_with_other_numbers_of_experts(make_run, tmp_path):
    """Several adapters of different sizes, by task and by layer."""
    run = make_run("a", MATRIX)
    stage = json.loads((run / "results.json").read_text())["stages"][-1]
    sizes = {"ScienceQA": [(2, 1), (2, 1)], "TextVQA": [(3, 5), (1, 4)], "Flickr30k": [(4, 2)]}
    for task, layers in sizes.items():
        routing = [
            {
                "layer": f"l{i}",
                "samples": 6,
                "vu": [6] + [0] * (m - 1),
                "if": [0] * (n - 1) + [6],
                "alpha": 0.5,
                "beta": 0.5,
            }
            for i, (m, n) in enumerate(layers)
        ]
        (run / stage / "answers" / f"{task}.info.json").write_text(json.dumps({"routing": routing}))
    write_report([run], tmp_path / "out")
    rows = read_csv(tmp_path / "out/routing-smolora.csv")
    for task, layers in sizes.items():
        for place, branch in enumerate(("vu", "if")):
            found = [int(row["chosen"]) for row in rows if (row["task"], row["branch"]) == (task, branch)]
            assert len(found) == max(layer[place] for layer in layers) and sum(found) == 6 * len(layers)
