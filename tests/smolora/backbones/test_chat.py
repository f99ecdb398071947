"""Chat templates and processors: the ids and tensors of transformers' own, labels on the answers, what is refused."""

from __future__ import annotations

import pickle

import pytest
import torch
from PIL import Image

from smolora.backbones.base import ImageInput
from smolora.backbones.chat import Chat
from smolora.backbones.load import load_backbone
from smolora.data.format import Message, ask
from smolora.data.images import BrokenImageError
from smolora.data.prompts import IGNORED_LABEL
from support.backbones import BACKBONES
from support.chat_models import CHAT_KINDS, save_chat

ANSWER = Message("assistant", ("red",))
TURNS = [ask("What is this?", True), ANSWER, ask("Where is it?"), Message("assistant", ("It is a park.",))]
SYSTEM = Message("system", ("Answer the question.",))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {kind: save_chat(tmp_path_factory.mktemp(kind), kind) for kind in CHAT_KINDS}


@pytest.fixture(scope="module")
def backbones(folders):
    return {kind: load_backbone(folder) for kind, folder in folders.items()}


@pytest.fixture(params=CHAT_KINDS)
def backbone(request, backbones):
    return backbones[request.param]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    paths = []
    for number, size in enumerate([(48, 48), (96, 48), (30, 70)]):
        path = folder / f"{number}.png"
        Image.effect_noise(size, 60 + number).convert("RGB").save(path)
        paths.append(path)
    return paths


def with_template(backbone, old, new):
    """The backbone with a part of its template changed."""
    assert old in backbone.template
    processor = pickle.loads(pickle.dumps(backbone)).processor
    processor.chat_template = processor.tokenizer.chat_template = backbone.template.replace(old, new)
    return Chat(processor, [], backbone.feature_token_id)


def test_what_ends_an_answer(backbone):
    """What generation_config says, and what the template writes."""
    assert isinstance(backbone, Chat) and backbone.settings() == {"prompt": "chat"}
    assert backbone.tokenizer.convert_ids_to_tokens(backbone.stop_token_ids) == ["<pad>", "<|im_end|>"]
    ids = backbone.tokenizer("red<|im_end|>red").input_ids
    assert backbone.decode(ids) == "red" and backbone.decode([*ids[:1], 0, *ids[1:]]) == "red"
    own = Chat(backbone.processor, [], backbone.feature_token_id)
    assert own.tokenizer.convert_ids_to_tokens(own.stop_token_ids) == ["<|im_end|>"]


def shown(tensor):
    """Without the rows of zeros that pad the images of a sample, for a model that takes (samples, images, ...)."""
    if tensor.dim() < 4 or tensor.shape[1] == 3:
        return tensor
    rows = tensor.flatten(0, 1)
    return rows[rows.flatten(1).any(1)]


@pytest.mark.parametrize("count", [0, 1, 3])
def test_ids_and_tensors_are_those_of_the_processor(backbone, pictures, count):
    """In one call for the whole conversation, which expands and joins by itself."""
    parts = [part for number in range(count) for part in (f"This is {number}", None)]
    messages = [SYSTEM, Message("user", (*parts, "What is shown?")), ANSWER, ask("Where is it?")]
    read = [backbone.read(path) for path in pictures[:count]]
    ids = backbone.expand(backbone.prompt(messages), [image.ids for image in read])
    text = backbone.tokenizer.apply_chat_template(
        [
            {
                "role": m.role,
                "content": [{"type": "image"} if p is None else {"type": "text", "text": p} for p in m.parts],
            }
            for m in messages
        ],
        tokenize=False,
        add_generation_prompt=True,
    )
    images = [Image.open(path) for path in pictures[:count]] or None
    expected = backbone.processor(text=[text], images=images, return_tensors="pt")
    assert expected["input_ids"].tolist() == [ids]
    found = {**backbone.join(read), **backbone.token_inputs(torch.tensor([ids]))}
    assert found.keys() == expected.keys() - {"input_ids", "attention_mask", "token_type_ids"}
    for name, value in found.items():
        assert torch.equal(shown(value), shown(expected[name])), name
    assert backbone.length(backbone.prompt(messages), pictures[:count]) == len(ids)


def test_only_answers_and_what_ends_them_are_learned(backbone):
    ids, labels = backbone.sample(TURNS)
    assert all(label in (IGNORED_LABEL, token) for token, label in zip(ids, labels, strict=True))
    learned = backbone.tokenizer.decode([label for label in labels if label != IGNORED_LABEL])
    assert learned == "red<|im_end|> It is a park.<|im_end|>"
    assert labels[-1] == ids[-1] == backbone.stop_token_ids[-1], "nothing follows the last answer"
    for turn in (1, 3):  # each answer follows its own prompt
        prompt = backbone.prompt(TURNS[:turn])
        assert ids[: len(prompt)] == prompt and labels[len(prompt) - 1] == IGNORED_LABEL != labels[len(prompt)]


def test_labels_of_placeholders(backbone, pictures):
    sample = backbone.sample(TURNS)
    image = backbone.read(pictures[0])
    ids, labels = backbone.expand_sample(sample, [image.ids])
    assert len(ids) == len(labels) == len(sample.input_ids) + len(image.ids) - 1
    assert ids.count(backbone.feature_token_id) == (20 if backbone.image_token == "<image>" else 4)
    assert [label for label in labels if label != IGNORED_LABEL] == [
        label for label in sample.labels if label != IGNORED_LABEL
    ]


TEXT = "{{ part['text'] }}"
REFUSED = {
    "earlier answers are cut": (TEXT, "{% if not loop.first or message is eq messages[-1] %}" + TEXT + "{% endif %}"),
    "an answer is announced otherwise": ("assistant\n{% endif %}", "assistant:\n{% endif %}"),
}


@pytest.mark.parametrize("old, new", REFUSED.values(), ids=REFUSED)
def test_a_template_that_does_not_continue_its_prompt_is_refused(backbones, old, new):
    with pytest.raises(ValueError, match=r"the chat template (does not continue its own prompt|must take messages)"):
        with_template(backbones["qwen2_5_vl"], old, new).sample(TURNS)


def test_templates_that_cannot_be_used(backbones):
    backbone = backbones["qwen2_5_vl"]
    with pytest.raises(ValueError, match="must end an answer with a special token"):
        with_template(backbone, "<|im_end|>", "")
    with pytest.raises(ValueError, match="must take messages whose content is a list of parts"):
        with_template(backbone, "{% if message['content'] is string %}", "{% if true %}")
    none = with_template(backbone, "<|image_pad|>", "")
    with pytest.raises(ValueError, match=r"must write <\|image_pad\|> once for each of 1 images"):
        none.prompt([ask("What?", True)])
    fails = with_template(backbone, TEXT, "{{ raise_exception('no system') if message['role'] == 'system' }}" + TEXT)
    with pytest.raises(ValueError, match=r"the chat template fails on .*no system"):
        fails.prompt([SYSTEM, ask("What?")])
    backbone = pickle.loads(pickle.dumps(backbone))
    backbone.processor.chat_template = backbone.tokenizer.chat_template = None
    with pytest.raises(ValueError, match=r"needs a chat template, and .* has none"):
        Chat(backbone.processor, [], 0)


@pytest.mark.parametrize("mark", ["<|im_end|>", "<|im_start|>system", "IMAGE"])
def test_a_text_with_a_mark_of_the_template_is_refused(backbone, mark):
    mark = mark.replace("IMAGE", backbone.image_token)
    for messages in ([ask(f"Is it {mark}?"), ANSWER], [ask("What?"), Message("assistant", (f"It is {mark}",))]):
        with pytest.raises(ValueError, match="a text must not hold"):
            backbone.sample(messages)


def test_images_that_cannot_be_read(backbone, tmp_path):
    for path in (tmp_path / "none.png", tmp_path / "text.png"):
        if path.name == "text.png":
            path.write_text("no picture")
        for use in (backbone.read, backbone.image_length):
            with pytest.raises(BrokenImageError):
                use(path)


def test_too_long_pictures_are_named(backbones, tmp_path):
    Image.new("RGB", (2000, 4)).save(tmp_path / "long.png")
    for use in (backbones["qwen2_5_vl"].read, backbones["qwen2_5_vl"].image_length):
        with pytest.raises(BrokenImageError, match=r"cannot process .*long\.png"):
            use(tmp_path / "long.png")


def test_smaller_images_are_padded(backbone):
    parts = [torch.ones(1, 3, 2, 4), torch.ones(1, 3, 5, 3)]
    joined = backbone.join(ImageInput([], {"pixels": part}) for part in parts)["pixels"]
    assert joined.shape == (2, 3, 5, 4)
    for row, part in zip(joined, parts, strict=True):
        assert torch.equal(row[:, : part.shape[2], : part.shape[3]], part[0]) and row.sum() == part.sum()


def test_padding_is_the_processors(backbone):
    with pytest.raises(ValueError, match=r"evaluation\.padding must be 'all' where model.prompt is chat"):
        backbone.cropping()


def test_a_paligemma_is_refused(tmp_path):
    """With a template of one's own, image tokens would be taken for its answer."""
    with torch.device("meta"):
        config = BACKBONES["paligemma"].make().config
    with pytest.raises(ValueError, match=r"chat must not be used for a paligemma, got .*: its token_type_ids set the"):
        Chat.load(tmp_path, config, None)


def test_it_goes_to_other_processes(backbone):
    other = pickle.loads(pickle.dumps(backbone))
    assert other.sample(TURNS) == backbone.sample(TURNS) and other.stop_token_ids == backbone.stop_token_ids
