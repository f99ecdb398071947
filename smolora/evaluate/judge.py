"""Knowledge in answers, as CoIN measures it beside their form: a language model rates each of them from 0 to 10.

Batches are planned from both files, and each finished one is a line under `<output>.parts/`, so that a killed call goes
on where it was. When all are finished, the output is written:

    ratings.jsonl         {"question_id", "rating", "reply"}, in the answers' order; a rating is null if none was read
    ratings.info.json     {"run": its settings, "count", "unrated", "score", "spread"}
"""

from __future__ import annotations

import hashlib
import json
import re
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import GenerationConfig

from ..arguments import is_int
from ..data.format import read_json, read_questions
from ..data.prompts import pad
from ..io.files import atomic_write_text, locked, write_json
from ..io.progress import Progress
from .generate import plain_generation, plan_batches, weights_digest
from .pairing import pair_answers
from .rules import Item
from .shards import AnswerShards, check_same_run

HIGHEST = 10
CRITERIA = {
    "general": (
        "You grade an answer to a question about a picture that you cannot see. The reference is right. Grade what the "
        "answer knows, not how it is written: length, upper case, full stops and extra words do not matter. "
        "10 means that it says what the reference says, in whatever words; 5 that it is right in part; "
        "0 that it is wrong, says nothing, or contradicts itself."
    ),
    "grounding": (
        "You grade where an answer places something in a picture that you cannot see. The reference is the right box, "
        "as left, top, right and bottom edge from 0 to 1. Grade how far the answer's box, or the place that it tells "
        "in words, is the same. 10 means nearly the same box; 5 that about half of both boxes is shared; "
        "0 that they share nothing, or that the answer tells no place."
    ),
}
REPLY = "Reply with one whole number from 0 to 10 and nothing else."
SAMPLING = {"temperature": 0.7, "top_p": 0.8, "repetition_penalty": 1.05, "top_k": 0}  # CoIN's; no limit by rank
_NUMBER = re.compile(r"(?<![\w.,-])\d+(?:\.\d+)?")


@dataclass(frozen=True)
class JudgeSettings:
    """Settings of the judge.

    Args:
        criteria: a name of `CRITERIA`.
        sample: draw replies as CoIN does (`SAMPLING`), so that ratings change with the seed. Otherwise they are greedy.
        seed: of the draws.
        max_new_tokens: maximum length of a reply; CoIN's.
        token_budget: maximum number of prompt tokens in a batch, padding included. A longer prompt gets its own batch.
    """

    criteria: str = "general"
    sample: bool = False
    seed: int = 0
    max_new_tokens: int = 20
    token_budget: int = 8192

    def __post_init__(self) -> None:
        if self.criteria not in CRITERIA:
            raise ValueError(f"criteria must be one of {', '.join(CRITERIA)}, got {self.criteria!r}")
        for name, low in (("seed", 0), ("max_new_tokens", 1), ("token_budget", 1)):
            value = getattr(self, name)
            if not is_int(value, low):
                raise ValueError(f"{name} must be an integer of at least {low}, got {value!r}")


class Verdict(NamedTuple):
    """The ratings of an answers file in figures."""

    score: float | None  # sum of the ratings / (10 n), 0 to 1; None without a rating
    spread: float | None  # standard deviation of rating / 10 over the answers; None with fewer than two
    count: int  # type: ignore[assignment]  # n, the number of rated answers
    unrated: int  # answers whose reply has no number from 0 to 10

    def __str__(self) -> str:
        shown = ["-" if value is None else f"{value:.4f}" for value in (self.score, self.spread)]
        unrated = f", {self.unrated} more without a rating" if self.unrated else ""
        return f"score {shown[0]}, standard deviation {shown[1]}, {self.count} answers{unrated}"


def verdict(ratings: Sequence[float | None]) -> Verdict:
    """Sum up ratings from 0 to 10, None for a reply without one."""
    shares = [rating / HIGHEST for rating in ratings if rating is not None]
    return Verdict(
        sum(shares) / len(shares) if shares else None,
        statistics.stdev(shares) if len(shares) > 1 else None,
        len(shares),
        len(ratings) - len(shares),
    )


def read_rating(reply: str) -> float | None:
    """The first number of a reply, such as the 8 of "8/10"; None if it has none or one that is not in 0..10."""
    found = _NUMBER.search(reply)
    rating = float(found[0]) if found else -1.0
    return rating if 0 <= rating <= HIGHEST else None


def judge_prompt(item: Item, answer: str, criteria: str) -> str:
    """What the judge is asked: criteria, question without the line that asks for a form, reference and answer."""
    references = (item.answer,) if isinstance(item.answer, str) else item.answer
    parts = {"Question": item.references[0], "Reference": " | ".join(references), "Answer": answer}
    return "\n\n".join([CRITERIA[criteria], *(f"{name}: {text}" for name, text in parts.items()), REPLY])


def judge_answers(
    model: Any,
    tokenizer: Any,
    questions: Path,
    answers: Path,
    output: Path,
    *,
    model_id: str,
    settings: JudgeSettings | None = None,
) -> Verdict:
    """Rate all answers of a file. A second call continues where the first one was stopped.

    Args:
        model: a causal language model in eval mode and on its device.
        tokenizer: its tokenizer. Its chat template is used if it has one.
        questions: the test file, whose `answer` is the reference.
        answers: JSON lines with `question_id` and `text`. Each line is rated.
        output: path of the ratings.
        model_id: the judge's name, which goes into the info file.
        settings: settings of the judge.

    Raises:
        ValueError: a file is malformed, a question has no reference, an answer has no question, a prompt is too long
            for the model, or the output belongs to a run with another judge, other files or other settings.
        BlockingIOError: another process writes the output.
    """
    settings = settings or JudgeSettings()
    with locked(output.with_name(f"{output.name}.lock"), str(output)):
        return _judge(model, tokenizer, questions, answers, output, model_id, settings)


def _judge(
    model: Any, tokenizer: Any, questions: Path, answers: Path, output: Path, model_id: str, settings: JudgeSettings
) -> Verdict:
    run = {
        "questions": hashlib.sha256(questions.read_bytes()).hexdigest(),
        "answers": hashlib.sha256(answers.read_bytes()).hexdigest(),
        "model_id": model_id,
        "weights": weights_digest(model),
        "prompt": hashlib.sha256(f"{CRITERIA[settings.criteria]}{REPLY}".encode()).hexdigest(),
        **asdict(settings),
    }
    info = output.with_suffix(".info.json")
    if output.exists():
        content = read_json(info)
        check_same_run(content["run"], run, output)
        AnswerShards(output, run).remove()  # left by a call that was killed between its last two steps
        return Verdict(*(content[name] for name in Verdict._fields))
    items, texts, *_ = pair_answers(str(questions), _items(questions), answers, "every")
    prompts = [
        _encode(tokenizer, judge_prompt(item, text, settings.criteria)) for item, text in zip(items, texts, strict=True)
    ]
    _check_lengths(model, items, prompts, settings)
    plan = plan_batches([len(prompt) for prompt in prompts], settings.token_budget)
    # prompts can differ with equal settings, by another tokenizer or chat template
    parts = AnswerShards(output, {**run, "plan": hashlib.sha256(json.dumps([prompts, plan]).encode()).hexdigest()})
    done = parts.read()
    with parts.writer(0) as write, Progress("judging", len(prompts), "answer") as progress:
        for number, batch in enumerate(plan):
            if number not in done:
                written = _replies(model, tokenizer, [prompts[place] for place in batch], settings, number)
                done[number] = {"batch": number, "replies": written}
                write(done[number])
            progress.update(len(batch))
    replies = {
        place: reply
        for number, batch in enumerate(plan)
        for place, reply in zip(batch, done[number]["replies"], strict=True)
    }
    ratings = [read_rating(replies[place]) for place in range(len(prompts))]
    result = verdict(ratings)
    lines = [
        {"question_id": item.question_id, "rating": rating, "reply": replies[place]}
        for place, (item, rating) in enumerate(zip(items, ratings, strict=True))
    ]
    write_json(info, {"run": run, **result._asdict()})
    atomic_write_text(output, "".join(json.dumps(line) + "\n" for line in lines))
    parts.remove()
    return result


def _items(path: Path) -> list[Item]:
    """The questions of a test file, each without its last line, with its references."""
    items = []
    for question in read_questions(path, unique=False):
        if question.answer is None:
            raise ValueError(f"{path}: record {question.index}: answer is missing")
        asked, _, form = question.text.rpartition("\n")
        items.append(Item(str(question.question_id), question.answer, (asked or form,)))
    return items


def _encode(tokenizer: Any, text: str) -> list[int]:
    if tokenizer.chat_template is None:
        return tokenizer(f"{text}\n\nRating:").input_ids
    turns = [{"role": "user", "content": text}]
    written = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return tokenizer(written, add_special_tokens=False).input_ids


def _check_lengths(model: Any, items: Sequence[Item], prompts: Sequence[list[int]], settings: JudgeSettings) -> None:
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is None or not prompts:
        return
    item, prompt = max(zip(items, prompts, strict=True), key=lambda pair: len(pair[1]))
    if len(prompt) + settings.max_new_tokens > limit:
        raise ValueError(
            f"the judge must read {len(prompt)} tokens for question {item.question_id} and write "
            f"{settings.max_new_tokens}, and has room for {limit}"
        )


@torch.inference_mode()
def _replies(
    model: nn.Module, tokenizer: Any, prompts: Sequence[list[int]], settings: JudgeSettings, batch: int
) -> list[str]:
    """The judge's replies to a batch. What is drawn depends on the seed and the batch alone."""
    end = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    ids, mask = pad(prompts, 0 if end is None else end, left=True)
    own: Any = model
    device = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
    config = GenerationConfig(
        max_new_tokens=settings.max_new_tokens,
        do_sample=settings.sample,
        **(SAMPLING if settings.sample else {}),
        eos_token_id=_ends(model, tokenizer),
        pad_token_id=0 if end is None else end,
    )
    with torch.random.fork_rng([device] if device.type == "cuda" else []), plain_generation(model):
        torch.manual_seed(settings.seed * 1_000_003 + batch)
        made = own.generate(input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=config)
    return [tokenizer.decode(row, skip_special_tokens=True).strip() for row in made[:, ids.shape[1] :].tolist()]


def _ends(model: Any, tokenizer: Any) -> list[int] | None:
    """Ids that end a reply: the tokenizer's, and those that the model's own generation settings name."""
    named = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = {tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])} - {None}
    return sorted(ids) or None
