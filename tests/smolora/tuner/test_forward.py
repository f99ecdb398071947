"""Training routes by what inference has: the prompt, told by labels or a mask, whoever computes the loss."""

import inspect

import pytest
import torch
from peft import get_peft_model
from transformers import Trainer, TrainingArguments

import smolora
from smolora.tuner.arguments import OWN_KEYWORDS
from support.spy import Spy, check
from support.tiny_llava import INSTRUCTION_DIM, adapted, batch, embeddings, fill_adapters, tiny_config, tiny_llava

DOWN = "model.language_model.layers.1.mlp.down_proj"


class Rows(torch.utils.data.Dataset):
    """Two samples with their instructions, and with a mask of their prompts if asked for."""

    def __init__(self, masked=False):
        inputs, e = batch((6, 6), seed=3, answer=3), embeddings(2)
        if masked:
            inputs["prompt_mask"] = inputs["labels"] == -100
        self.rows = [{k: v[i] for k, v in inputs.items()} | {"instruction_embeds": e[i]} for i in range(2)]

    def __len__(self):
        return 2

    def __getitem__(self, i):
        return self.rows[i]


def own_loss(outputs, labels, num_items_in_batch=None):
    return torch.nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def train(tmp_path, masked=False, config=None, **options):
    """A step of transformers' Trainer that changes nothing: the VU router's logits, and the loss."""
    torch.manual_seed(0)
    model = get_peft_model(tiny_llava(), config or tiny_config())
    fill_adapters(model)
    arguments = {name: options.pop(name) for name in ("compute_loss_func",) if name in options}
    options = {"remove_unused_columns": False, **options}
    trainer = Trainer(
        model,
        TrainingArguments(
            tmp_path,
            per_device_train_batch_size=2,
            max_steps=1,
            report_to="none",
            use_cpu=True,
            learning_rate=0.0,
            save_strategy="no",
            disable_tqdm=True,
            **options,
        ),
        train_dataset=Rows(masked),
        eval_dataset=Rows(masked),
        **arguments,
    )
    loss = trainer.train().training_loss
    return smolora.routing_report(model)[DOWN]["vu_logits"], loss, trainer


OWN_LOSSES = {"label_smoothing_factor": 0.1, "compute_loss_func": own_loss}


@pytest.mark.parametrize("option", OWN_LOSSES)
def test_a_trainer_that_takes_the_labels_away(option, tmp_path):
    """Refused by name, and with the mask the routes are those of the labels; in evaluation, too."""
    want, *_ = train(tmp_path)
    given = {option: OWN_LOSSES[option]}
    with pytest.raises(ValueError, match=r"prompt_mask must be given in training.*compute_loss_func.*\(2, 11\)"):
        train(tmp_path, **given)
    got, _, trainer = train(tmp_path, masked=True, **given)
    torch.testing.assert_close(got, want)
    trainer.evaluate()
    torch.testing.assert_close(smolora.routing_report(trainer.model)[DOWN]["vu_logits"], want)


@pytest.mark.parametrize("default", [None, 0])
@pytest.mark.parametrize("masked", [False, True])
def test_a_trainer_keeps_the_columns_that_are_ours(default, masked, tmp_path):
    """It drops those that the model's forward does not name; then a default instruction would be taken."""
    config = tiny_config(default_instruction=default)
    config.instruction_embeddings = torch.zeros(1, INSTRUCTION_DIM) + 5
    want, loss, _ = train(tmp_path)
    got, mine, _ = train(tmp_path, masked, config, remove_unused_columns=True)
    torch.testing.assert_close(got, want)
    assert mine == loss


def test_the_signature():
    """As the model's own, and ours beside; a model without adapters has its own again."""
    own = list(inspect.signature(tiny_llava().forward).parameters)
    model = adapted()
    names = list(inspect.signature(model.get_base_model().forward).parameters)
    assert [name for name in names if name not in own] == list(OWN_KEYWORDS)
    assert {"instruction_embeds", "task_ids", "experts", "image_to_sample", "prompt_mask"} <= set(OWN_KEYWORDS)
    assert [name for name in names if name in own] == own and names[-1] == own[-1]
    assert list(inspect.signature(model.unload().forward).parameters) == own


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.int32])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_mask_is_as_labels(dtype, mode):
    """A pair of answers, whose log-probabilities the caller computes."""
    model, e = getattr(adapted(), mode)(), embeddings(2)
    inputs = batch((5, 9), answer=3)
    mask = inputs["labels"] == -100
    want = model(**inputs, instruction_embeds=e).logits
    given = {k: v for k, v in inputs.items() if k != "labels"}
    with Spy(model) as calls:
        got = model(**given, instruction_embeds=e, prompt_mask=mask.to(dtype)).logits
    assert torch.equal(got, want)
    check(calls, model, e, e, mask & inputs["attention_mask"].bool())


def test_a_mask_goes_before_labels():
    """Of several turns, those of the user that are labelled as nothing may be answers, too."""
    model, e, inputs = adapted(), embeddings(2), batch((5, 9), answer=3)
    mask = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    mask[:, :9] = True
    with Spy(model) as calls:
        model(**inputs, instruction_embeds=e, prompt_mask=mask)
    check(calls, model, e, e, mask & inputs["attention_mask"].bool())


def test_a_sample_without_a_prompt_routes_by_its_valid_tokens():
    model, e, inputs = adapted(), embeddings(2), batch((5, 9))
    mask = inputs["attention_mask"].bool().clone()
    mask[1] = False
    with Spy(model) as calls:
        model(**inputs, instruction_embeds=e, prompt_mask=mask)
    check(calls, model, e, e, inputs["attention_mask"].bool())


def test_what_training_needs():
    """Neither where no adapter averages prompts, nor while it generates; a prompt alone needs a mask of it."""
    e, inputs = embeddings(2), batch((5, 9))
    for config in (tiny_config(route_over="valid"), tiny_config(route_over="all")):
        adapted(config).train()(**inputs, instruction_embeds=e)
    model = adapted().train()
    with pytest.raises(ValueError, match="prompt_mask must be given in training"):
        model(**inputs, instruction_embeds=e)
    with torch.no_grad(), pytest.raises(ValueError, match="prompt_mask must be given in training"):
        model(**inputs, instruction_embeds=e)  # log-probabilities of another policy
    model.generate(**inputs, instruction_embeds=e, max_new_tokens=2)
    with model.disable_adapter():
        model(**inputs)
    model.eval()(**inputs, instruction_embeds=e)


BAD = [
    torch.ones(2, 5, dtype=torch.bool),
    torch.ones(14, dtype=torch.bool),
    torch.ones(2, 14),
    [[True] * 14] * 2,
]


@pytest.mark.parametrize("mask", BAD, ids=["length", "dimensions", "dtype", "type"])
def test_a_bad_mask_is_refused(mask):
    with pytest.raises(ValueError, match=r"prompt_mask must be bool \(2, 14\), True where a token is no answer.*got"):
        adapted()(**batch((5, 9)), instruction_embeds=embeddings(2), prompt_mask=mask)


def test_generate_takes_no_mask():
    inputs = batch((5, 9))
    with pytest.raises(ValueError, match=r"prompt_mask must be left out of generate\(\)"):
        adapted().generate(**inputs, instruction_embeds=embeddings(2), prompt_mask=inputs["attention_mask"])
