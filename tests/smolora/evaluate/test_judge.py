"""The judge: what it is asked, which ratings are read, what they sum up to, and that a killed call goes on."""

from __future__ import annotations

import json
import re

import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from small_llava import small_tokenizer
from smolora.cli import main
from smolora.evaluate import judge
from smolora.evaluate.judge import (
    CRITERIA,
    SAMPLING,
    JudgeSettings,
    judge_answers,
    judge_prompt,
    read_rating,
    verdict,
)
from smolora.evaluate.rules import Item
from support.scoring import write_lines

TOKENIZER = small_tokenizer()


class KnownJudge(torch.nn.Module):
    """A judge that gives the number at the end of the answer, and keeps what it was asked."""

    def __init__(self, limit: int = 4000) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.config = LlamaConfig(max_position_embeddings=limit)
        self.generation_config = GenerationConfig(repetition_penalty=9.0)
        self.asked, self.settings, self.batches, self.dies_at = [], [], 0, None

    def generate(self, input_ids, attention_mask, generation_config):
        if self.batches == self.dies_at:
            raise KeyboardInterrupt
        self.batches += 1
        self.settings.append((generation_config, self.generation_config.repetition_penalty))
        replies = []
        for ids, mask in zip(input_ids, attention_mask, strict=True):
            text = TOKENIZER.decode(ids[mask.bool()].tolist(), skip_special_tokens=True)
            self.asked.append(text)
            replies.append(TOKENIZER(re.search(r"Answer: .*? (\S+)\n", text)[1], add_special_tokens=False).input_ids)
        width = max(map(len, replies))
        padded = [[*reply, *[TOKENIZER.eos_token_id] * (width - len(reply))] for reply in replies]
        return torch.cat([input_ids, torch.tensor(padded)], 1)


@pytest.fixture
def files(tmp_path):
    """Five questions, and an answer to each of four, one of them twice."""
    questions = [
        {"question_id": n, "image": f"{n}.png", "text": f"What is {n}?\nAnswer briefly.", "answer": f"thing {n}"}
        for n in range(5)
    ]
    (tmp_path / "test.json").write_text(json.dumps(questions))
    rated = [(0, "10"), (1, "0"), (2, "7.5"), (3, "eleven"), (2, "5")]
    answers = [{"question_id": n, "text": f"it is {rating}"} for n, rating in rated]
    return tmp_path / "test.json", write_lines(tmp_path / "answers.jsonl", answers), tmp_path / "ratings.jsonl"


def rate(files, model=None, **settings):
    model = model or KnownJudge()
    return judge_answers(model, TOKENIZER, *files, model_id="known", settings=JudgeSettings(**settings))


def test_known_ratings(files):
    model = KnownJudge()
    found = rate(files, model)
    assert found.count == 4 and found.unrated == 1
    assert found.score == pytest.approx((10 + 0 + 7.5 + 5) / 40)
    assert found.spread == pytest.approx((0.546875 / 3) ** 0.5)  # of 1, 0, 0.75 and 0.5
    lines = [json.loads(line) for line in files[2].read_text().splitlines()]
    assert [(line["question_id"], line["rating"]) for line in lines] == [
        ("0", 10),
        ("1", 0),
        ("2", 7.5),
        ("3", None),
        ("2", 5),
    ]
    info = json.loads(files[2].with_suffix(".info.json").read_text())
    assert info["score"] == found.score and info["run"]["model_id"] == "known"
    assert sorted(path.name for path in files[2].parent.iterdir()) == [
        "answers.jsonl",
        "ratings.info.json",
        "ratings.jsonl",
        "test.json",
    ]
    assert str(found) == "score 0.5625, standard deviation 0.4270, 4 answers, 1 more without a rating"


def test_what_it_is_asked(files):
    model = KnownJudge()
    rate(files, model)
    (first,) = [text for text in model.asked if "it is 10" in text]
    assert CRITERIA["general"] in first and "Question: What is 0?\n" in first and "Reference: thing 0\n" in first
    assert "Answer briefly." not in first  # how to answer is not the judge's business
    assert first.endswith("nothing else.\n\nRating:")
    config, own = model.settings[0]
    assert config.do_sample is False and config.max_new_tokens == 20
    assert own in (None, 1.0)  # not the model's own penalty


def test_grounding_has_criteria_of_its_own():
    item = Item("0", ("[0.10, 0.20, 0.50, 0.60]", "so"), ("Where?",))
    text = judge_prompt(item, "[0.1, 0.2, 0.5, 0.6]", "grounding")
    assert text.startswith(CRITERIA["grounding"]) and "Reference: [0.10, 0.20, 0.50, 0.60] | so" in text


@pytest.mark.parametrize(
    ("reply", "rating"),
    [
        ("7", 7),
        ("10", 10),
        ("0", 0),
        ("8/10", 8),
        ("Rating: **6**", 6),
        ("7.5", 7.5),
        ("7.", 7),
        ("I would give it a 9.", 9),
        ("11", None),
        ("100", None),
        ("-3", None),
        ("ten", None),
        ("", None),
    ],
)
def test_ratings_are_read(reply, rating):
    assert read_rating(reply) == rating


def test_figures_of_few_ratings():
    assert verdict([]) == (None, None, 0, 0) and verdict([None]) == (None, None, 0, 1)
    assert verdict([4]) == (0.4, None, 1, 0) and verdict([2, 6, None])[:2] == (0.4, pytest.approx(0.2 * 2**0.5))


def test_a_killed_call_goes_on_where_it_was(files):
    whole = rate((*files[:2], files[2].with_name("whole.jsonl")), token_budget=1)
    model = KnownJudge()
    model.dies_at = 3
    with pytest.raises(KeyboardInterrupt):
        rate(files, model, token_budget=1)
    assert not files[2].exists()
    parts = files[2].with_name("ratings.jsonl.parts") / "process-0.jsonl"
    parts.write_bytes(parts.read_bytes() + b'{"batch": 3, "rep')  # torn
    with pytest.raises(ValueError, match=r"belongs to another run .*criteria 'general', now 'grounding'"):
        rate(files, criteria="grounding", token_budget=1)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ValueError, match=r"another run \(plan "):
        patch.setattr(judge, "_encode", lambda tokenizer, prompt: [1, 2, 3])  # by another chat template
        rate(files, token_budget=1)
    again = KnownJudge()
    assert rate(files, again, token_budget=1) == whole
    assert again.batches == 5 - 3
    assert files[2].read_bytes() == files[2].with_name("whole.jsonl").read_bytes()
    silent = KnownJudge()
    assert rate(files, silent, token_budget=1) == whole and silent.batches == 0  # finished: it is only read
    with pytest.raises(ValueError, match="belongs to another run"):
        rate(files, seed=1, token_budget=1)


@pytest.fixture(scope="module")
def random_judge():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(TOKENIZER),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=1200,
        bos_token_id=TOKENIZER.bos_token_id,
        eos_token_id=TOKENIZER.eos_token_id,
        pad_token_id=TOKENIZER.pad_token_id,
    )
    return LlamaForCausalLM(config).eval()


def test_drawn_replies_depend_on_the_seed_alone(files, random_judge):
    """On a random model: a batch at a time gives what a killed and continued call gives, and another seed another."""

    def replies(name, **settings):
        output = files[2].with_name(name)
        rate((*files[:2], output), random_judge, max_new_tokens=6, **settings)
        return output.read_text()

    greedy, drawn = replies("greedy"), replies("drawn", sample=True)
    assert drawn == replies("again", sample=True)
    assert len({greedy, drawn, replies("other", sample=True, seed=1)}) == 3
    assert greedy == replies("greedy again", seed=1)


def test_drawing_is_coins(files, monkeypatch):
    model = KnownJudge()
    rate(files, model, sample=True)
    config, _ = model.settings[0]
    assert config.do_sample and {name: getattr(config, name) for name in SAMPLING} == SAMPLING
    assert (config.temperature, config.top_p, config.repetition_penalty) == (0.7, 0.8, 1.05)


def test_a_chat_template_is_used(files, monkeypatch):
    monkeypatch.setattr(TOKENIZER, "chat_template", "{% for m in messages %}<<{{ m['content'] }}>>{% endfor %}go")
    model = KnownJudge()
    assert rate(files, model).count == 4
    assert all(text.startswith("<<You grade") and text.endswith("nothing else.>>go") for text in model.asked)


def test_prompts_that_do_not_fit_are_refused_before_any_is_rated(files):
    model = KnownJudge(limit=100)
    with pytest.raises(ValueError, match=r"the judge must read \d+ tokens for question \d and write 20, and has room"):
        rate(files, model)
    assert model.batches == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"criteria": "kind"}, "criteria must be one of general, grounding, got 'kind'"),
        ({"max_new_tokens": 0}, "max_new_tokens must be an integer of at least 1, got 0"),
        ({"seed": -1}, "seed must be an integer of at least 0, got -1"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        JudgeSettings(**settings)


def test_files_that_do_not_fit_are_refused(files, tmp_path):
    questions, answers, output = files
    stray = write_lines(tmp_path / "stray.jsonl", [{"question_id": 9, "text": "it is 3"}])
    with pytest.raises(ValueError, match=r"stray.jsonl: line 1: .*test.json has no question 9"):
        rate((questions, stray, output))
    (tmp_path / "bare.json").write_text(json.dumps([{"question_id": 0, "text": "q"}]))
    with pytest.raises(ValueError, match=r"bare.json: record 0: answer is missing"):
        rate((tmp_path / "bare.json", answers, output))
    assert not output.exists()


def test_the_command(files, random_judge, tmp_path, capsys):
    random_judge.save_pretrained(tmp_path / "judge")
    TOKENIZER.save_pretrained(tmp_path / "judge")
    command = ["judge", "--questions", str(files[0]), "--answers", str(files[1]), "--output", str(files[2])]
    assert main([*command, "--model", str(tmp_path / "judge"), "--device", "cpu", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed.keys() == {"score", "spread", "count", "unrated"} and printed["count"] + printed["unrated"] == 5
    assert main([*command, "--model", str(tmp_path)]) == 1
    assert "--model must be the folder of a language model" in capsys.readouterr().err
    assert judge.HIGHEST == 10
