"""Texts of instructions: the benchmark's (Table 8, as in the released files), and the one at the end of a prompt.

An instruction is the part of a prompt that asks for a form of answer.
"""

from __future__ import annotations

from collections.abc import Iterable

IMAGE_TOKEN = "<image>"  # the place of an image in a text
MARKS = "<instruction>", "</instruction>"  # of the instruction in a prompt, where a recipe says so
TURNS = ("USER:", "ASSISTANT:")  # in the prompt of a conversation; the data has the user's text alone

_LETTER = "Answer with the option's letter from the given choices directly."
_WORD = "Answer the question using a single word or phrase."
_CAPTION = "What is happening in the presented picture?\nPlease describe it in one complete sentence."
_OBJECT = f"What is the object in the image?\n{_WORD}"
_BACKGROUND = f"What is the background of the image?\n{_WORD}"

SINGLE_TYPE: dict[str, tuple[str, ...]] = {
    "ScienceQA": (_LETTER,),
    "TextVQA": (_WORD,),
    "Flickr30k": (_CAPTION,),
    "ImageNet": (_OBJECT,),
    "GQA": (_WORD,),
    "VQAv2": (_WORD,),
    "VizWiz": (_WORD,),
    "TextCaps": (_CAPTION,),
    "OCRVQA": (_WORD,),
    "Places365": (_BACKGROUND,),
}

_LETTERS = (
    _LETTER,
    "Select the correct answer by choosing the corresponding letter from the options provided.",
    "Select the correct letter from the given options to answer the question.",
    "Identify the correct answer by choosing the appropriate letter from the choices.",
    "Pick the correct answer by selecting the letter associated with the correct choice.",
)
_WORDS = (
    "Answer the question with a single word or a brief, descriptive phrase.",
    "Use a single word or a short phrase to respond to the question.",
    "Use one word or a concise phrase to respond to the question.",
    "Answer the question with just one word or a brief phrase.",
    "Answer using only one word or a short, descriptive phrase.",
)
_CAPTIONS = (
    _CAPTION,
    "What does the image display clearly and succinctly?\nProvide a full sentence explaining it.",
    "What is depicted in the displayed picture?\nSummarize it using a single, concise sentence.",
    "How would you interpret the scene in the picture?\nExpress your answer in one informative sentence.",
    "What is the captured scene about?\nExplain it clearly in one simple sentence.",
)
_OBJECTS = (
    "What is the main object present in the image?\nProvide your answer using a word or brief phrase.",
    "Which specific object does the image depict?\nGive your answer in one word or a short phrase.",
    "What category does the object in the image belong to?\nAnswer using a single word or phrase.",
    "What is the primary object visible in the image?\nAnswer using a brief phrase or single word.",
    "What is the object in the image?\nAnswer briefly with a word or a short phrase.",
)
_BACKGROUNDS = (
    _BACKGROUND,
    "What is the background depicted in the image?\nProvide your answer using a word or brief phrase.",
    "Which type of background does the image show?\nGive your answer in one word or a short phrase.",
    "What category best describes the background in the image?\nAnswer using a brief phrase or single word.",
    "What is the primary background visible in the image?\nAnswer briefly with a word or a short phrase.",
)

MULTI_TYPE: dict[str, tuple[str, ...]] = {
    "ScienceQA": _LETTERS,
    "TextVQA": _WORDS,
    "Flickr30k": _CAPTIONS,
    "ImageNet": _OBJECTS,
    "GQA": _WORDS,
    "VQAv2": _WORDS,
    "VizWiz": _WORDS,
    "TextCaps": _CAPTIONS,
    "OCRVQA": _WORDS,
    "Places365": _BACKGROUNDS,
}


def known_instructions(task: str) -> tuple[str, ...]:
    """Return the benchmark's instructions of a task, single-type and multi-type."""
    return SINGLE_TYPE.get(task, ()) + MULTI_TYPE.get(task, ())


def instruction_of(prompt: str, templates: Iterable[str] = ()) -> str:
    """Find the instruction of a prompt: the longest template that it ends with, else its last line.

    Args:
        prompt: the user's text ("<image>\\nquestion\\ninstruction"), or a conversation's prompt that ends with it
            ("... USER: <image>\\nquestion\\ninstruction ASSISTANT:").
        templates: known instructions, of one or more lines. A template must start at the start of a word.

    Returns:
        The instruction, stripped of white space.

    Raises:
        ValueError: the prompt is empty, or holds nothing but an image.
    """
    if not isinstance(prompt, str):
        raise ValueError(f"prompt must be a string, got {type(prompt).__name__}")
    text = prompt.replace("\r\n", "\n").strip()
    user, assistant = TURNS
    if text.endswith(assistant):
        text = text.removesuffix(assistant).rpartition(user)[2]
    text = _without_images(text)
    if not text:
        raise ValueError(f"prompt must hold an instruction, got {prompt!r}")
    best = ""
    for template in templates:
        template = _without_images(template.replace("\r\n", "\n"))
        head = text.removesuffix(template)
        if len(template) > len(best) and len(head) < len(text) and (not head or head[-1].isspace()):
            best = template
    return best or text.rpartition("\n")[2].strip()


def marked_instruction(prompt: str) -> str:
    """Return the part of a prompt between <instruction> and </instruction>.

    Raises:
        ValueError: it has no such part, or several.
    """
    start, end = MARKS
    if (prompt.count(start), prompt.count(end)) == (1, 1):
        marked = prompt.partition(start)[2].partition(end)[0].strip()
        if marked:
            return marked
    raise ValueError(f"a prompt must mark its instruction by {start} and {end}, each once, got {prompt!r}")


def _without_images(text: str) -> str:
    """Strip the image tokens at the head of a prompt and in its last lines; elsewhere they are text."""
    text = text.strip()
    while text.startswith(IMAGE_TOKEN):
        text = text.removeprefix(IMAGE_TOKEN).lstrip()
    while text.endswith(f"\n{IMAGE_TOKEN}"):
        text = text.removesuffix(IMAGE_TOKEN).rstrip()
    return text
