"""The benchmark's instructions (Table 8, as the released files have them), single-type and multi-type."""

from __future__ import annotations

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
