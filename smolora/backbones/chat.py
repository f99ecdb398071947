"""Any model with a chat template: prompts by the template, images by the model's own processor, in Pillow and NumPy.

The processor is put together from image processor and tokenizer. A video processor, which needs torchvision, is left
out: there are no videos here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor
from transformers import GenerationConfig

# not from the package itself, which in older transformers hides it where torchvision is missing
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.utils import GENERATION_CONFIG_NAME

from ..data.format import Message, ask
from ..data.images import BrokenImageError, image_size, read_image
from ..data.prompts import IGNORED_LABEL, Sample
from .base import Backbone, ImageInput

PROBE = (ask("Which?"), Message("assistant", ("This",)))


class Chat(Backbone):
    """A model with a chat template, in the style "chat".

    Args:
        processor: its processor, of tokenizer and image processor.
        stops: ids that end an answer, besides the one that the template writes after each.
        feature_token_id: the id of a feature of an image in the model's configuration.

    Raises:
        ValueError: there is no chat template, or it is not one that can be trained with.
    """

    style: ClassVar[str] = "chat"
    _loaded: tuple[Any, ...]  # what it was loaded from

    def __init__(self, processor: Any, stops: Sequence[int], feature_token_id: int) -> None:
        self.processor, self.tokenizer = processor, processor.tokenizer
        self.template = processor.chat_template or self.tokenizer.chat_template
        if self.template is None:
            raise ValueError(f"model.prompt chat needs a chat template, and {self.tokenizer.name_or_path} has none")
        self.image_token: str = processor.image_token
        self.image_token_id = self.tokenizer.convert_tokens_to_ids(self.image_token)
        self.feature_token_id = feature_token_id
        special = {id_: str(token) for id_, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        special.pop(self.tokenizer.unk_token_id, None)  # which any text may have
        self._reserved = {*special.values(), self.image_token}
        self.stop_token_ids = self._with_own_end(stops, special)
        self.pad_token_id = (
            self.stop_token_ids[0] if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id
        )
        of_text = self.tokenizer.model_input_names
        of_tokens = [name for name in ("mm_token_type_ids", "token_type_ids") if name in processor.model_input_names]
        self._kind_of_token = next((name for name in of_tokens if name not in of_text), None)
        self._not_of_images = {*of_text, "input_ids", "attention_mask", *of_tokens}
        self._lengths: dict[Path, int] = {}

    @classmethod
    def load(cls, folder: str | Path, config: Any, tokenizer: Any) -> Chat:
        if type(config) not in PROCESSOR_MAPPING:
            raise ValueError(f"model.prompt chat needs a model with a processor, got {config.model_type} in {folder}")
        if config.model_type == "paligemma":
            raise ValueError(
                f"model.prompt chat must not be used for a paligemma, got {folder}: its token_type_ids set the answer "
                "apart from the prompt, while the other models' set images apart from text"
            )
        kind = without_video(PROCESSOR_MAPPING[type(config)])
        images = AutoImageProcessor.from_pretrained(folder, backend="pil", local_files_only=True)
        settings, _ = kind.get_processor_dict(str(folder), local_files_only=True)
        processor = kind.from_args_and_dict([images, tokenizer], settings)
        stops: list[int] = []
        if Path(folder, GENERATION_CONFIG_NAME).is_file():
            own = GenerationConfig.from_pretrained(folder, local_files_only=True).eos_token_id
            stops += own if isinstance(own, list) else [] if own is None else [own]
        if tokenizer.eos_token_id is not None:
            stops.append(tokenizer.eos_token_id)
        backbone = cls(processor, stops, config.image_token_id)
        backbone._loaded = folder, config, tokenizer
        return backbone

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self).load, self._loaded  # the processor's class is made here, and cannot be pickled

    def _with_own_end(self, stops: Sequence[int], special: dict[int, str]) -> list[int]:
        """Find the special token that the template writes after an answer, and return all ids that end one.

        Raises:
            ValueError: the template writes none, does not continue its own prompt, or takes no messages of parts.
        """
        shown = self._written(PROBE, answer=False)
        if "'type'" in shown or any(part not in shown for message in PROBE for part in message.parts if part):
            raise ValueError(
                f"the chat template must take messages whose content is a list of parts, it wrote {shown!r}"
            )
        self.stop_token_ids = [*special]
        (*_, end) = self.sample(PROBE).input_ids
        return list(dict.fromkeys([*stops, end]))

    # ---- text

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        return self._tokens(self._written(messages, answer=True))

    def sample(self, messages: Sequence[Message]) -> Sample:
        text = self._written(messages, answer=False)
        ids = self._tokens(text)
        labels, end = [IGNORED_LABEL] * len(ids), 0
        for place, message in enumerate(messages):
            if message.role != "assistant":
                continue
            prompt = self._written(messages[:place], answer=True)
            if not text.startswith(prompt):
                raise ValueError(
                    "the chat template does not continue its own prompt, so what is trained is not what is asked: "
                    f"it wrote {prompt!r} before an answer, and with it {text!r}"
                )
            asked = self._tokens(prompt)
            start = next((i for i, (a, b) in enumerate(zip(asked, ids, strict=False)) if a != b), len(asked))
            stops = (i for i in range(start, len(ids)) if ids[i] in self.stop_token_ids)
            end = next(stops, -1) + 1
            if not end:
                raise ValueError(f"the chat template must end an answer with a special token, it wrote {text!r}")
            labels[start:end] = ids[start:end]
        return Sample(ids[:end], labels[:end])

    def _written(self, messages: Sequence[Message], *, answer: bool) -> str:
        """Write a conversation by the template; `answer`: up to where the next answer begins.

        Raises:
            ValueError: a text holds what the template and the processor write themselves, or the template fails.
        """
        content = []
        for message in messages:
            for text in message.parts:
                held = next((token for token in self._reserved if text is not None and token in text), None)
                if held is not None:
                    raise ValueError(f"a text must not hold {held!r}, which this model reads as a mark, got {text!r}")
            parts = [{"type": "image"} if part is None else {"type": "text", "text": part} for part in message.parts]
            content.append({"role": message.role, "content": parts})
        try:
            text = self.tokenizer.apply_chat_template(
                content, chat_template=self.template, tokenize=False, add_generation_prompt=answer
            )
        except Exception as error:  # a template may raise anything, for example on a system message
            raise ValueError(f"the chat template fails on {content!r}: {error}") from error
        images = sum(part is None for message in messages for part in message.parts)
        if text.count(self.image_token) != images:
            raise ValueError(
                f"the chat template must write {self.image_token} once for each of {images} images, it wrote {text!r}"
            )
        return text

    def _tokens(self, text: str) -> list[int]:
        bos = self.tokenizer.bos_token
        written = bos is not None and text.startswith(bos)  # by the template; otherwise the tokenizer adds its own
        ids = self.tokenizer(text, add_special_tokens=False).input_ids
        if written or bos is None or self.tokenizer("").input_ids[:1] != [self.tokenizer.bos_token_id]:
            return ids
        return [self.tokenizer.bos_token_id, *ids]

    # ---- images

    def image_length(self, path: Path) -> int:
        if path not in self._lengths:
            width, height = image_size(path)
            try:
                found = self.processor._get_num_multimodal_tokens(image_sizes=[[height, width]])
                self._lengths[path] = int(found["num_image_tokens"][0])
            except (AttributeError, NotImplementedError):  # of a processor that does not tell
                self._lengths[path] = len(self.read(path).ids)
            except ValueError as error:
                raise BrokenImageError(f"cannot process {path}: {error}") from error
        return self._lengths[path]

    def read(self, path: Path) -> ImageInput:
        image = read_image(path)
        try:
            return self.process(image)
        except ValueError as error:  # for example a picture that is too long for its width
            raise BrokenImageError(f"cannot process {path}: {error}") from error

    def process(self, image: Image.Image) -> ImageInput:
        """Process an RGB image."""
        found = self.processor(text=[self.image_token], images=[image], add_special_tokens=False, return_tensors="pt")
        tensors = {name: value for name, value in found.items() if name not in self._not_of_images}
        return ImageInput(found["input_ids"][0].tolist(), tensors)

    def token_inputs(self, ids: Tensor) -> dict[str, Tensor]:
        if self._kind_of_token is None:
            return {}
        return {self._kind_of_token: torch.tensor(self.processor.create_mm_token_type_ids(ids.tolist()))}


def without_video(kind: type[Any]) -> type[Any]:
    """Return a processor's class without its video processor."""
    names = [name for name in kind.get_attributes() if name != "video_processor"]
    return type(kind.__name__, (kind,), {"get_attributes": classmethod(lambda cls: names)})
