"""Prompts of LLaVA-1.5 (vicuna_v1) as token ids, the same for training and evaluation.

    A chat between ... questions. USER: <image>\\n{text} ASSISTANT: {answer}</s>USER: {text} ASSISTANT: {answer}</s>

The pieces before and after the image are tokenised separately, and the sequence starts with one BOS. An image is one
placeholder id until `PromptEncoder.expand` repeats it for each of its features. Special tokens are not recognised in
questions and answers: `<image>`, `</s>` and `<s>` in them are tokenised as text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..instructions.texts import IMAGE_TOKEN
from .format import Message, ask

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
# the same prompt as transformers' chat template; a conversation that starts with a system message brings its own
CHAT_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}" + SYSTEM + " {% endif %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}USER: {% elif message['role'] == 'assistant' %}ASSISTANT: {% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}" + IMAGE_TOKEN + "\n{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}{% endif %}"
    "{{ '</s>' if message['role'] == 'assistant' else ' ' }}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
OPENING = f"{SYSTEM} USER: "
IGNORED_LABEL = -100


class Sample(NamedTuple):
    """A training sample: token ids, and labels, which are -100 except on the answer and EOS."""

    input_ids: list[int]
    labels: list[int]


def prompt_text(text: str, image: bool) -> str:
    """Format the prompt of a question; the answer follows it after a space."""
    return f"{SYSTEM} USER: {IMAGE_TOKEN}\n{text} ASSISTANT:" if image else f"{SYSTEM} USER: {text} ASSISTANT:"


class PlainText:
    """A tokenizer of texts in which nothing is read as a special token.

    Args:
        tokenizer: the language model's; needs `bos_token_id` and `eos_token_id`.
        image_token_id: the placeholder of an image.

    Attributes:
        pad_token_id: fills a batch; EOS where the tokenizer has none of its own.

    Raises:
        ValueError: the tokenizer has no BOS or no EOS.
    """

    def __init__(self, tokenizer: Any, image_token_id: int) -> None:
        for name in ("bos_token_id", "eos_token_id"):
            if getattr(tokenizer, name) is None:
                raise ValueError(f"the tokenizer must have a {name}, got None")
        self.tokenizer = tokenizer
        self.pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        reserved = {*tokenizer.all_special_ids, self.pad_token_id, image_token_id}
        self._reserved = reserved - {tokenizer.unk_token_id}  # which a text may have
        self._spelled = [str(token) for token in tokenizer.convert_ids_to_tokens(sorted(self._reserved))]

    def is_certain(self, *texts: str) -> bool:
        """Return whether texts can certainly be tokenised, without doing it."""
        return not any(token in text for token in self._spelled for text in texts)

    def tokens(self, text: str) -> list[int]:
        """Tokenise a text.

        Raises:
            ValueError: the tokenizer cannot encode it without a special token.
        """
        ids = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
        read = self._reserved.intersection(ids)
        if read:  # an added token that is not marked as special, or a part of the vocabulary itself
            token = self.tokenizer.convert_ids_to_tokens(min(read))
            raise ValueError(f"a text must not hold {token!r}, which this tokenizer cannot read as text, got {text!r}")
        return ids


class PromptEncoder:
    """Encoder of questions and answers to token ids.

    Args:
        tokenizer: the language model's; needs `bos_token_id` and `eos_token_id`.
        image_token_id: the placeholder of an image in the model's configuration.
        image_features: number of features of an image.

    Raises:
        ValueError: the tokenizer has no BOS or no EOS.
    """

    def __init__(self, tokenizer: Any, image_token_id: int, image_features: int) -> None:
        self.plain = PlainText(tokenizer, image_token_id)
        self.tokenizer = tokenizer
        self.image_token_id = image_token_id
        self.image_features = image_features
        self.pad_token_id = self.plain.pad_token_id
        self._opening = self.plain.tokens(OPENING)  # of every prompt with an image

    @classmethod
    def for_model(cls, tokenizer: Any, config: Any) -> PromptEncoder:
        """Make the encoder for a LLaVA of this configuration."""
        vision = config.vision_config
        features = (vision.image_size // vision.patch_size) ** 2
        if config.vision_feature_select_strategy == "full":  # with the class token
            features += 1
        return cls(tokenizer, config.image_token_id, features)

    def prompt(self, text: str, image: bool) -> list[int]:
        """Encode a question; its image, if it has one, is a single placeholder.

        Raises:
            ValueError: the tokenizer cannot encode the text without a special token.
        """
        return self.conversation([ask(text, image)])

    def conversation(self, messages: Sequence[Message]) -> list[int]:
        """Encode a conversation that ends with a question; each image is a single placeholder.

        Raises:
            ValueError: the tokenizer cannot encode a text without a special token.
        """
        return self._encode(messages)

    def sample(self, text: str, answer: str, image: bool) -> Sample:
        """Encode a question with its answer; only the answer and EOS have labels."""
        return self.answered([ask(text, image), Message("assistant", (answer,))])

    def answered(self, messages: Sequence[Message]) -> Sample:
        """Encode a conversation that ends with an answer; only answers and the EOS after each have labels."""
        # tokenised in one piece with its question, as released; the ids that the prompt alone shares are not the answer
        ids = self._encode(messages)
        labels = [IGNORED_LABEL] * len(ids)
        for place, message in enumerate(messages):
            if message.role == "assistant":
                prompt = self._encode(messages[:place])
                start = next((i for i, (a, b) in enumerate(zip(prompt, ids, strict=False)) if a != b), len(prompt))
                end = ids.index(self.tokenizer.eos_token_id, start) + 1
                labels[start:end] = ids[start:end]
        return Sample(ids, labels)

    def is_short(self, text: str, answer: str, image: bool, limit: int) -> bool:
        """Return whether a sample certainly fits into `limit` ids and can be encoded, without encoding it.

        The bound counts a token for every byte.
        """
        prompt = prompt_text(text, image) + answer
        plain = self.plain.is_certain(text, answer)
        return plain and len(prompt.encode()) + image * self.image_features + 8 <= limit  # 8: spaces, BOS and EOS

    def expand(self, ids: Sequence[int]) -> list[int]:
        """Repeat every placeholder for each feature of its image."""
        expanded: list[int] = []
        for token in ids:
            expanded.extend([token] * (self.image_features if token == self.image_token_id else 1))
        return expanded

    def expand_sample(self, sample: Sample) -> Sample:
        """Expand a training sample; images have no labels."""
        labels: list[int] = []
        for token, label in zip(sample.input_ids, sample.labels, strict=True):
            labels.extend([label] * (self.image_features if token == self.image_token_id else 1))
        return Sample(self.expand(sample.input_ids), labels)

    def length(self, ids: Sequence[int]) -> int:
        """Return the number of ids after `expand`."""
        return len(ids) + (self.image_features - 1) * sum(token == self.image_token_id for token in ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Decode generated ids to text, stripped, without special tokens."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True).strip()

    def _encode(self, messages: Sequence[Message]) -> list[int]:
        """Encode a conversation; the text between two images, or after an EOS, is tokenised as one piece."""
        ids = [self.tokenizer.bos_token_id]
        piece = ""
        for part in self._written(messages):
            if isinstance(part, str):
                piece += part
            else:
                ids += [*self._tokens(piece), part]
                piece = ""
        return [*ids, *self._tokens(piece)]

    def _written(self, messages: Sequence[Message]) -> Iterator[str | int]:
        """Yield what is written: texts, and the ids of image and EOS."""
        own = messages[0].role == "system"
        yield (messages[0].text if own else SYSTEM) + " "
        for message in messages[own:]:
            if message.role == "assistant":
                yield f" {message.text}"
                yield self.tokenizer.eos_token_id
            else:
                yield "USER: "
                for place, part in enumerate(message.parts):
                    if place:
                        yield "\n"
                    yield self.image_token_id if part is None else part
                yield " ASSISTANT:"

    def _tokens(self, text: str) -> list[int]:
        return self._opening if text == OPENING else self.plain.tokens(text)


def pad(sequences: Sequence[Sequence[int]], value: int, *, left: bool) -> tuple[Tensor, Tensor]:
    """Pad sequences to a batch.

    Returns:
        (B, S) int64, padded with `value` on the left or the right, and the mask (B, S) int64, 0 on padding.
    """
    width = max(map(len, sequences))
    batch = torch.full((len(sequences), width), value, dtype=torch.int64)
    mask = torch.zeros_like(batch)
    for row, sequence in enumerate(sequences):
        place = slice(width - len(sequence), width) if left else slice(len(sequence))
        batch[row, place] = torch.tensor(sequence, dtype=torch.int64)
        mask[row, place] = 1
    return batch, mask
