"""Made runs in the layout of `smolora.report.layout`."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from PIL import Image

from smolora.evaluate.metrics import continual_metrics
from smolora.report import write_report
from support.reports import MATRIX, TASKS

LAYERS = ["projector.linear_1", "layers.0.mlp.up_proj", "layers.0.mlp.down_proj"]


def routing(seed: int) -> list[dict]:
    draw = random.Random(seed)
    layers = []
    for name in LAYERS:
        alpha = draw.random()
        counts = [[draw.randint(1, 9) for _ in range(4)] for _ in range(2)]
        layers.append(
            {
                "layer": name,
                "samples": sum(counts[0]),
                "vu": counts[0],
                "if": counts[1],
                "alpha": alpha,
                "beta": 1 - alpha,
            }
        )
    return layers


def write_run(
    folder: Path, matrix: list[list[float]], *, method: str = "smolora", tasks=TASKS, experts: int = 8, **results
) -> Path:
    """A run with three questions a task; its answers say which stage gave them."""
    data = folder.parent / "data"
    data.mkdir(exist_ok=True)
    Image.new("RGB", (400, 300), "grey").save(data / "x.png")
    tests = {}
    for task in tasks:
        questions = [
            {"question_id": i, "image": "x.png", "text": f"{task} {i}?\nBriefly | please.", "answer": ["yes", "no"]}
            for i in range(3)
        ]
        del questions[2]["image"]
        (data / f"{task}.json").write_text(json.dumps(questions))
        tests[task] = {"questions": f"../data/{task}.json", "images": "../data"}
    single = len(matrix) == 1
    stages = [f"stage-0-{method}"] if single else [f"stage-{k}-{task}" for k, task in enumerate(tasks, 1)]
    for k, stage in enumerate(stages):
        (folder / stage / "answers").mkdir(parents=True)
        for task in tasks if single else tasks[: k + 1]:
            path = folder / stage / "answers" / f"{task}.jsonl"
            # question 1 changes its answer from stage to stage, the others do not
            lines = [{"question_id": i, "text": f"{stage} {method}" if i == 1 else "same"} for i in range(3)]
            path.write_text("".join(json.dumps(line) + "\n" for line in lines))
            layers = routing(k + len(task)) if method == "smolora" else []
            path.with_suffix(".info.json").write_text(json.dumps({"routing": layers}))
    content = {
        "method": method,
        "benchmark": "CVIT",
        "setting": "single",
        "protocol": "smolora",
        "tasks": list(tasks),
        "stages": stages,
        "matrix": matrix,
        "mif": [[90.0] * len(row) for row in matrix],
        "tests": tests,
        "config": {"adapter": {"num_vu_experts": experts // 2, "num_if_experts": experts // 2}},
        "versions": {"torch": "2.13.0"},
        **results,
    }
    if method != "smolora":
        content["config"] = {}
    content |= continual_metrics(tasks, content["matrix"], content["mif"])
    (folder / "results.json").write_text(json.dumps(content))
    return folder


@pytest.fixture
def make_run(tmp_path):
    return lambda name, *args, **kwargs: write_run(tmp_path / name, *args, **kwargs)


@pytest.fixture(scope="session")
def one(tmp_path_factory):
    """The report of one run."""
    return write_report([write_run(tmp_path_factory.mktemp("one") / "a", MATRIX)]).parent


@pytest.fixture(scope="session")
def two(tmp_path_factory):
    """The report of two runs, with cases."""
    folder = tmp_path_factory.mktemp("two")
    runs = [write_run(folder / "a", MATRIX), write_run(folder / "b", MATRIX, method="seqlora")]
    return write_report(runs, cases_per_task=3).parent


@pytest.fixture(scope="session")
def several(tmp_path_factory):
    """The report of two runs that differ in the number of experts."""
    folder = tmp_path_factory.mktemp("several")
    return write_report([write_run(folder / f"e{n}", MATRIX, experts=n) for n in (2, 4)]).parent
