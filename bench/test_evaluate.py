"""The evaluator's benchmark: it runs, and refuses answers that differ."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import evaluate

TINY = replace(evaluate.PRESETS["small"], hidden=32, intermediate=32, layers=1, image_size=28, questions=6, side=30)


def test_row(tmp_path):
    row = evaluate.measure(TINY, tmp_path, rounds=1, new_tokens=2)
    assert row["equal_answers"] == 1 and row["questions"] == 6
    rates = row["samples_per_second"]
    assert row["speedup"] == rates["batched"] / rates["one by one"] > 0


def test_different_answers_are_not_reported(tmp_path, monkeypatch):
    generate = evaluate.generate_answers

    def other(model, backbone, job, **options):
        generate(model, backbone, job, **options)
        if "batched" in job.output.name:
            job.output.write_text(job.output.read_text().replace('"text": "', '"text": "x'))

    monkeypatch.setattr(evaluate, "generate_answers", other)
    with pytest.raises(SystemExit, match=r"equal those one by one in 0\.0%"):
        evaluate.measure(TINY, tmp_path, rounds=0, new_tokens=1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_needs_a_gpu(monkeypatch):
    monkeypatch.setattr("sys.argv", ["evaluate.py", "--preset", "llava-7b"])
    with pytest.raises(SystemExit, match="--preset llava-7b needs a GPU"):
        evaluate.main()
