"""Shards: what killed processes have written is found again, and nothing else is taken for it."""

from __future__ import annotations

import json

import pytest

from smolora.evaluate.shards import AnswerShards

RUN = {"model_id": "small", "max_new_tokens": 5}


@pytest.fixture
def shards(tmp_path):
    return AnswerShards(tmp_path / "answers.jsonl", RUN)


def batch(number: int) -> dict:
    return {"batch": number, "answers": [[number, f"answer {number}"]]}


def test_batches_of_all_processes_are_read(shards):
    assert shards.read() == {}
    for process, numbers in ((0, (0, 2)), (1, (1,))):
        with shards.writer(process) as write:
            for number in numbers:
                write(batch(number))
    assert shards.read() == {number: batch(number) for number in range(3)}
    shards.remove()
    assert not shards.folder.exists() and shards.read() == {}


def test_a_line_is_on_the_disk_before_the_next(shards):
    with shards.writer(0) as write:
        write(batch(0))
        assert shards.read() == {0: batch(0)}


def test_a_torn_last_line_is_cut_off_and_written_anew(shards):
    with shards.writer(0) as write:
        write(batch(0))
        write(batch(1))
    path = shards.folder / "process-0.jsonl"
    path.write_bytes(path.read_bytes()[:-7])
    assert shards.read() == {0: batch(0)}
    with shards.writer(0) as write:
        write(batch(1))
    assert shards.read() == {0: batch(0), 1: batch(1)}
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"run": RUN}, batch(0), batch(1)]


def test_a_line_that_is_broken_elsewhere_is_named(shards):
    with shards.writer(0) as write:
        write(batch(0))
    path = shards.folder / "process-0.jsonl"
    path.write_bytes(path.read_bytes().replace(b"answer 0", b"answer \n0"))
    with pytest.raises(ValueError, match=r"process-0\.jsonl is broken \(.*\): remove it"):
        shards.read()


def test_another_runs_shards_are_refused(shards, tmp_path):
    with shards.writer(0) as write:
        write(batch(0))
    other = AnswerShards(tmp_path / "answers.jsonl", {**RUN, "max_new_tokens": 6})
    with pytest.raises(ValueError, match=r"belongs to another run \(max_new_tokens 5, now 6\): remove it or name"):
        other.read()
