"""Instructions found in prompts."""

import pytest

from smolora.instructions.texts import instruction_of, marked_instruction

CAPTION = "What is happening in the presented picture?\nPlease describe it in one complete sentence."
OBJECT = "What is the object in the image?\nAnswer the question using a single word or phrase."
PHRASE = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
TEMPLATES = (PHRASE, OBJECT, CAPTION, LETTER)

PROMPTS = [
    # (prompt, instruction with the templates, instruction without)
    (f"<image>\nWhat colour is it?\n{PHRASE}", PHRASE, PHRASE),
    (f"<image>\n{OBJECT}", OBJECT, PHRASE),  # the longest: a shorter template is its last line
    (f"<image>\n{CAPTION}", CAPTION, "Please describe it in one complete sentence."),
    (f"{OBJECT}\n<image>", OBJECT, PHRASE),  # the image last, as LLaVA's own data has it at times
    (CAPTION, CAPTION, "Please describe it in one complete sentence."),
    (f"Which one?\nA. a\nB. b\n{LETTER}", LETTER, LETTER),
    (f"Which one? {LETTER}", LETTER, f"Which one? {LETTER}"),  # in a line of its own or not
    (f"Which one?\r\n{LETTER}\r\n", LETTER, LETTER),  # as a file from Windows has it
    (f"{LETTER}\nWhich one?", "Which one?", "Which one?"),  # a template counts at the end alone
    ("Un" + PHRASE, "Un" + PHRASE, "Un" + PHRASE),  # and from the start of a word
    ("<image>\nDescribe it.  \n\n", "Describe it.", "Describe it."),
    ("<image>Describe it.", "Describe it.", "Describe it."),
    ("Describe it.", "Describe it.", "Describe it."),
    # whole conversations: the system sentence and turns before the last are none of the instruction
    (f"A chat. USER: <image>\nWhat?\n{PHRASE} ASSISTANT:", PHRASE, PHRASE),
    (f"A chat. USER: <image>\n{OBJECT} ASSISTANT:", OBJECT, PHRASE),
    ("A chat. USER: Describe it. ASSISTANT:", "Describe it.", "Describe it."),
    # the image's name within a line is text
    ("<image>\nIs it <image> or <img>?", "Is it <image> or <img>?", "Is it <image> or <img>?"),
    ("Is it <image> or <img>?", "Is it <image> or <img>?", "Is it <image> or <img>?"),
    (f"What is <image>?\n{PHRASE}", PHRASE, PHRASE),
    ("<image>\n<image>\nCompare them.", "Compare them.", "Compare them."),
    ("A chat. USER: Who? ASSISTANT: Me.</s>USER: Describe it. ASSISTANT: ", "Describe it.", "Describe it."),
]


def test_a_template_with_the_images_place():
    """As a recipe may have it, copied out of its prompts."""
    assert instruction_of(f"<image>\n{CAPTION}", [f"<image>\n{CAPTION}"]) == CAPTION
    assert instruction_of(f"Which?\n{CAPTION}", ["<image>", f"{CAPTION}\n<image>"]) == CAPTION


@pytest.mark.parametrize(("prompt", "known", "unknown"), PROMPTS)
def test_instruction_of(prompt: str, known: str, unknown: str):
    for templates in (TEMPLATES, TEMPLATES[::-1]):  # order means nothing
        assert instruction_of(prompt, templates) == known
    assert instruction_of(prompt) == unknown


@pytest.mark.parametrize("prompt", ["", " \n", "<image>", "<image>\n", "A chat. USER: <image>\n ASSISTANT:"])
def test_no_instruction(prompt: str):
    with pytest.raises(ValueError, match=r"prompt must hold an instruction, got "):
        instruction_of(prompt, TEMPLATES)


def test_prompt_of_another_type():
    with pytest.raises(ValueError, match="prompt must be a string, got NoneType"):
        instruction_of(None)


def test_a_marked_instruction():
    assert marked_instruction("What?\n<instruction> In one word. </instruction> Thanks") == "In one word."
    for prompt in ("What?", "<instruction></instruction>", "<instruction>a</instruction><instruction>b</instruction>"):
        with pytest.raises(ValueError, match="a prompt must mark its instruction by <instruction>"):
            marked_instruction(prompt)
