"""Architectures other than LLaVA-1.5: each sample routes in a batch as it does alone, with its own instruction."""

import re
import warnings

import pytest
import torch
import transformers as T
from peft import PeftModel, get_peft_model

import smolora
from smolora.tuner import MixtureLinear
from support.backbones import BACKBONES, IMAGE, TEXT, TEXT_ONLY, VOCABULARY, drawn, qformer
from support.tiny_llava import embeddings, tiny_config

ALL = {**BACKBONES, **TEXT_ONLY}
GREEDY = {"max_new_tokens": 4, "do_sample": False}
SIMILAR = ("vipllava", "llava_next_video", "qwen3_vl_moe", "qwen2", "gemma3_text", "qwen3_moe")  # to another one
FAMILIES = [pytest.param(name, marks=pytest.mark.slow if name in SIMILAR else ()) for name in ALL]
EXPAND = ("llava", "mistral3", "llava_next", "qwen2_5_vl", "qwen3_vl", "idefics3", "mllama", "blip2_llama")
BEAMS = [pytest.param(name, marks=() if name in EXPAND else pytest.mark.slow) for name in ALL if name != "llama4"]
WITHOUT_IMAGES = [param for param in FAMILIES if param.values[0] in BACKBONES]


def rows_for(name):
    """Texts of unequal lengths; images of each kind, two in one sample, and a sample without any where that may be."""
    backbone, last = ALL[name], ALL[name].kinds - 1
    if name in TEXT_ONLY:
        return [(5, []), (9, []), (3, [])]
    rows, several = [(5, [(0, 1)]), (9, [(last, 2)]), (3, [(0, 3)])], (6, [(last, 5), (0, 6)])
    if backbone.whole_samples:
        return [*rows, several]
    return rows if backbone.needs_image else [*rows, (4, []), several]


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model.train()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_batch_is_as_one_by_one(name):
    """Logits, and greedy tokens, of a batch with a cache and of samples without one."""
    if name == "paligemma" and not hasattr(T.GenerationMixin, "_expand_multimodal_outputs"):
        pytest.skip("older transformers' PaliGemma answers padded samples otherwise, without adapters too")
    model, backbone, rows = ALL[name].adapted(), ALL[name], rows_for(name)
    e, whole = embeddings(len(rows)) * 2, ALL[name].batch(rows)
    singles = [backbone.batch([row]) for row in rows]
    with torch.no_grad():
        got = model(**whole, instruction_embeds=e).logits
        other = model(**whole, instruction_embeds=e.flip(0)).logits
        for i, single in enumerate(singles):
            want = model(**single, instruction_embeds=e[i : i + 1]).logits[0]
            torch.testing.assert_close(got[i, -len(want) :], want, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(got[:2], other[:2], atol=1e-2), "instructions change nothing: the test shows nothing"
    tokens = model.generate(**whole, instruction_embeds=e, **GREEDY)[:, -4:]
    for i, single in enumerate(singles):
        want = model.generate(**single, instruction_embeds=e[i : i + 1], use_cache=False, **GREEDY)
        assert torch.equal(tokens[i], want[0, -4:]), i


@pytest.mark.parametrize("name", BEAMS)
def test_beams_are_those_of_one_by_one(name):
    """Llama 4 has none: transformers does not repeat its images."""
    model, backbone, rows = ALL[name].adapted(), ALL[name], rows_for(name)
    if not hasattr(T.GenerationMixin, "_expand_multimodal_outputs"):
        rows = [row for row in rows if len(row[1]) < 2]  # older transformers mix up a sample's images
    e, options = embeddings(len(rows)) * 2, {**GREEDY, "num_beams": 2}
    tokens = model.generate(**backbone.batch(rows), instruction_embeds=e, **options)[:, -4:]
    for i, row in enumerate(rows):
        want = model.generate(**backbone.batch([row]), instruction_embeds=e[i : i + 1], **options)
        assert torch.equal(tokens[i], want[0, -4:]), i


@pytest.mark.parametrize("name", FAMILIES)
def test_training_gives_every_adapter_the_gradients_of_one_by_one(name):
    """Also where layers are recomputed, after a forward with other instructions; at the base there is none."""
    model, backbone, rows = without_dropout(ALL[name].adapted()), ALL[name], rows_for(name)
    e, count, whole = embeddings(len(rows)) * 2, 2 * len(rows), ALL[name].batch(rows, answer=2)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    model(**whole, instruction_embeds=e).loss.backward()
    got = {n: p.grad.clone() for n, p in trained.items()}
    routed = {n.rpartition(".")[0] for n, grad in got.items() if grad.any()}
    assert routed == {n.rpartition(".")[0] for n in trained} and all(
        p.grad is None for n, p in model.named_parameters() if n not in trained
    )
    model.zero_grad()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    loss = model(**whole, instruction_embeds=e).loss
    with torch.no_grad():
        model(**whole, instruction_embeds=e.flip(0))
    loss.backward()
    for parameter, grad in got.items():
        torch.testing.assert_close(trained[parameter].grad, grad, rtol=1e-4, atol=1e-5)
    model.gradient_checkpointing_disable()
    model.zero_grad()
    for i, row in enumerate(rows):
        loss = model(**backbone.batch([row], answer=2), instruction_embeds=e[i : i + 1]).loss
        (loss * 2 / count).backward()
    if "moe" in name:
        return  # its loss has a part over the experts' use in the whole batch
    for parameter, grad in got.items():
        want = trained[parameter].grad
        assert (grad - want).abs().max() <= 1e-3 * want.abs().max() + 1e-6, parameter


@pytest.mark.parametrize("name", FAMILIES)
def test_training_routes_as_inference_and_a_saved_adapter_as_itself(name, tmp_path):
    """By the prompt, whatever the answer is."""
    model, rows = ALL[name].adapted(), rows_for(name)
    e, whole = embeddings(len(rows)) * 2, ALL[name].batch(rows, answer=2)
    width = whole["input_ids"].shape[1]
    prompt = {k: v[:, :-2] if v.shape[:2] == (len(rows), width) else v for k, v in whole.items() if k != "labels"}
    with torch.no_grad():
        logits = model(**whole, instruction_embeds=e).logits
        training = smolora.routing_report(model)
        model(**prompt, instruction_embeds=e)
    inference = smolora.routing_report(model)
    assert training.keys() == inference.keys() == set(model.targeted_module_names)
    for layer, row in training.items():
        for branch in ("vu_logits", "if_logits"):
            torch.testing.assert_close(row[branch], inference[layer][branch], rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path)
    base = model.unload()
    loaded = PeftModel.from_pretrained(base, tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(**whole, instruction_embeds=e).logits, logits)


TOWERS = (
    "pixtral",
    "mistral3",
    "llava_next",
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "glm4v",
    "idefics3",
    "llama4",
    "mllama",
)


@pytest.mark.parametrize(
    "name", [n if n in ("pixtral", "qwen2_5_vl", "mllama") else pytest.param(n, marks=pytest.mark.slow) for n in TOWERS]
)
def test_layers_of_the_tower_too(name):
    """Where a target names them: its rows are told apart as the connector's are."""
    with torch.device("meta"):
        layers = [n for n, m in ALL[name].make().named_modules() if isinstance(m, torch.nn.Linear)]
    tower = [n for n in layers if re.search(r"visual|vision_tower|vision_model", n)]
    model, backbone, rows = ALL[name].adapted(target_modules=tower), ALL[name], rows_for(name)
    e = embeddings(len(rows)) * 2
    with torch.no_grad():
        got = model(**backbone.batch(rows), instruction_embeds=e).logits
        for i, row in enumerate(rows):
            want = model(**backbone.batch([row]), instruction_embeds=e[i : i + 1]).logits[0]
            torch.testing.assert_close(got[i, -len(want) :], want, rtol=1e-3, atol=1e-3)
    if any(images for _, images in rows):
        with torch.no_grad(), model.disable_adapter():
            assert not torch.allclose(model(**backbone.batch(rows)).logits, got, atol=1e-2)


@pytest.mark.parametrize("name", ["llava_next", "llava_onevision"])
def test_tiles_are_of_their_image(name):
    """Two images of 3 and 5 tiles; an explicit map names images or tiles."""
    model, backbone = BACKBONES[name].adapted(), BACKBONES[name]
    whole, e = backbone.batch([(5, [(0, 1)]), (7, [(1, 2)])]), embeddings(2)
    with torch.no_grad():
        want = model(**whole, instruction_embeds=e).logits
        projector = next(key for key in smolora.routing_report(model) if key.endswith("linear_1"))
        logits = smolora.routing_report(model)[projector]["if_logits"]
        router = dict(model.named_parameters())[f"base_model.model.{projector}.smolora_experts.default.if_router"]
        torch.testing.assert_close(logits, (e @ router.T)[[0] * 3 + [1] * 5])
        embeds = model.get_input_embeddings()(whole["input_ids"])
        rest = {k: v for k, v in whole.items() if k != "input_ids"}
        for owner in ([0, 1], [0] * 3 + [1] * 5):
            got = model(inputs_embeds=embeds, **rest, instruction_embeds=e, image_to_sample=torch.tensor(owner)).logits
            assert torch.equal(got, want)
        with pytest.raises(ValueError, match=r"linear_1: image_to_sample must be given.*2 images"):
            model(inputs_embeds=embeds, **rest, instruction_embeds=e)
        with pytest.raises(ValueError, match="each of the 2 images, or of each of their 8 tiles, got 3"):
            model(inputs_embeds=embeds, **rest, instruction_embeds=e, image_to_sample=torch.tensor([0, 1, 1]))


@pytest.mark.parametrize(
    "name",
    [each for each in WITHOUT_IMAGES if not BACKBONES[each.values[0]].needs_image and each.values[0] != "gemma3"],
)
def test_a_batch_without_images_trains_the_image_adapters(name):
    """By a gradient of zero, from a blank image that changes nothing else, and every module runs: processes that train
    together wait for each other in each."""
    model, backbone = BACKBONES[name].adapted().train(), BACKBONES[name]
    inputs, e, ran = backbone.batch([(5, []), (9, [])], answer=2), embeddings(2), set()
    with torch.no_grad():
        want = model(**inputs, instruction_embeds=e).loss
    for module_name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=module_name: ran.add(name))
    loss = model(**inputs, instruction_embeds=e).loss
    assert torch.equal(loss, want)
    loss.backward()
    missing = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing
    seen = {n for n, m in model.named_modules() if isinstance(m, MixtureLinear) and m.takes_images}
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    images = [p for n, p in trained.items() if n.partition(".smolora_experts.")[0] in seen]
    assert images and not any(p.grad.any() for p in images)
    layers = {n for n, m in model.named_modules() if isinstance(m, MixtureLinear)}
    assert layers <= ran
    report = smolora.routing_report(model)
    assert {row["rows"] for row in report.values()} == {"samples"}


def test_images_that_onevision_does_not_cut():
    """Several images of a sample are a tile each, if the batch says how many each sample has."""
    model, backbone = BACKBONES["llava_onevision"].adapted(), BACKBONES["llava_onevision"]
    e, counts = embeddings(2), torch.tensor([2, 1])
    pixels = torch.zeros(3, 5, 3, 28, 28)
    pixels[0, :1], pixels[1, :1], pixels[2] = drawn(1, 1, 3, 28, 28), drawn(2, 1, 3, 28, 28), drawn(3, 5, 3, 28, 28)
    sizes, words = torch.tensor([[28, 28], [28, 28], [56, 56]]), list(range(10, 16))
    texts = [[IMAGE] * 10 + words, [IMAGE] * 24 + words]
    width = max(map(len, texts))
    ids = torch.tensor([[0] * (width - len(t)) + t for t in texts])
    with torch.no_grad():
        got = model(
            input_ids=ids,
            attention_mask=(ids > 0).long(),
            pixel_values=pixels,
            image_sizes=sizes,
            batch_num_images=counts,
            instruction_embeds=e,
        ).logits[:, -6:]
        for i, (rows, text) in enumerate(((slice(2), texts[0]), (slice(2, 3), texts[1]))):
            want = model(
                input_ids=torch.tensor([text]),
                pixel_values=pixels[rows],
                image_sizes=sizes[rows],
                batch_num_images=counts[i : i + 1],
                instruction_embeds=e[i : i + 1],
            ).logits[0, -6:]
            torch.testing.assert_close(got[i], want, rtol=1e-3, atol=1e-3)
    assert backbone.kinds == 2


@pytest.mark.parametrize("name", ["pixtral", "mistral3", "qwen2_5_vl"])
def test_an_image_in_a_packed_row_routes_by_itself(name):
    """Whatever other images the batch has, with one embedding for all, too."""
    model, backbone = BACKBONES[name].adapted(), BACKBONES[name]
    e, found = embeddings(1)[0], []
    for rows in ([(5, [(0, 1)]), (7, [(1, 2), (0, 3)])], [(5, [(0, 1)])], [(7, [(1, 2), (0, 3)])]):
        with torch.no_grad():
            model(**backbone.batch(rows), instruction_embeds=e)
        report = smolora.routing_report(model)
        row = next(row for row in report.values() if row["rows"] == "images")
        assert row["alpha"].shape == (int(row["cu_seqlens"][-1]),)
        found.append(row["vu_logits"])
    torch.testing.assert_close(found[0], torch.cat(found[1:]), rtol=1e-4, atol=1e-4)


def test_what_merges_patches_has_rows_of_its_own():
    """Image sizes tell them."""
    backbone = BACKBONES["mistral3"]
    with torch.no_grad():
        model = backbone.adapted(target_modules=r".*patch_merger\.merging_layer")
        model(**backbone.batch([(5, [(0, 1)])]), instruction_embeds=embeddings(1))
        (row,) = smolora.routing_report(model).values()
    assert row["cu_seqlens"].tolist() == [0, 4]


@pytest.mark.parametrize("where", ["qwen2_5_vl", "llava_onevision"])
def test_videos_are_refused_by_name(where):
    model, backbone = BACKBONES[where].adapted(), BACKBONES[where]
    inputs = backbone.batch([(5, [(0, 1)]), (7, [(1, 2)])])
    videos = {"pixel_values_videos": inputs["pixel_values"]}
    if "image_grid_thw" in inputs:
        videos["video_grid_thw"] = inputs["image_grid_thw"]
    with pytest.raises(ValueError, match="pixel_values_videos must be left out"):
        model(**inputs, **videos, instruction_embeds=embeddings(2))


def test_blip_without_a_prompt():
    """It makes one for each picture."""
    model, backbone = BACKBONES["blip2_llama"].adapted(), BACKBONES["blip2_llama"]
    pixels, e = backbone.tensors([[(0, 1)], [(0, 2)]])["pixel_values"], embeddings(2) * 2
    got = model.generate(pixels, instruction_embeds=e, **GREEDY)
    for i in range(2):
        assert torch.equal(model.generate(pixels[i : i + 1], instruction_embeds=e[i], **GREEDY)[0], got[i])
    with pytest.raises(ValueError, match=r"shape \(2, 12\)"):
        model.generate(pixels, instruction_embeds=embeddings(3), **GREEDY)
    with pytest.raises(RuntimeError, match="outside of its model's forward"):
        model.get_base_model().language_model.generate(input_ids=torch.tensor([[9, 10]]), **GREEDY)


ENCODERS = {
    "T5": lambda: T.T5ForConditionalGeneration(T.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=32, num_layers=1)),
    "BLIP-2 with T5": lambda: qformer(
        "Blip2", T.T5Config(vocab_size=VOCABULARY, d_model=64, d_kv=16, d_ff=64, num_layers=1), "wi"
    ).make(),
}


@pytest.mark.parametrize("name", ENCODERS)
def test_encoder_decoders_are_refused(name):
    with pytest.raises(ValueError, match="needs a decoder-only language model, got"):
        get_peft_model(ENCODERS[name](), tiny_config(target_modules=["wi", "wo"]))


def test_layers_that_see_sound_are_refused():
    audio = dict(
        num_mel_bins=8,
        encoder_layers=1,
        encoder_attention_heads=2,
        encoder_ffn_dim=32,
        d_model=32,
        max_source_positions=16,
    )
    config = T.Qwen2AudioConfig(audio_config=audio, text_config=dict(TEXT, model_type="qwen2"), audio_token_index=IMAGE)
    for target in (r".*multi_modal_projector\.linear", r".*audio_tower.*fc1"):
        with pytest.raises(ValueError, match=r"target_modules must not name .*sees sound"):
            get_peft_model(T.Qwen2AudioForConditionalGeneration(config), tiny_config(target_modules=target))
    model = get_peft_model(
        T.Qwen2AudioForConditionalGeneration(config), tiny_config(target_modules=r".*language_model.*up_proj")
    )
    model.eval()(input_ids=torch.tensor([[9, 10, 11]]), instruction_embeds=embeddings(1))


def test_a_row_of_several_images_that_nothing_tells_apart():
    """A model of a kind that nobody has looked at: refused where it hands its images over together."""
    from smolora.tuner.images import Images

    images = Images(torch.tensor([[IMAGE] * 4] * 2), IMAGE, count=2)
    assert images.arrange(torch.zeros(2, 4, 8))[1] is None
    for shape in ((1, 8, 8), (8, 8)):
        with pytest.raises(ValueError, match=r"images in one row.*target_modules"):
            images.arrange(torch.zeros(shape))


def test_experts_in_stacked_parameters_are_named():
    """Whether the default names them or the caller: other layers get adapters, and nothing would tell."""
    with torch.device("meta"):
        qwen, llama = TEXT_ONLY["qwen3_moe"].make, TEXT_ONLY["llama"].make
        shown = (
            r"experts of 1 layers .* model\.layers\.\*\.mlp\.experts\.gate_up_proj, .*\.down_proj.* on 3 other modules"
        )
        for targets in (None, ["gate_proj", "up_proj", "down_proj"]):
            with pytest.warns(UserWarning, match=shown):
                get_peft_model(qwen(), tiny_config(target_modules=targets))
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            get_peft_model(qwen(), tiny_config(target_modules=["q_proj", "v_proj"]))
            get_peft_model(llama(), tiny_config())
