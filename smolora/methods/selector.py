"""Selectors: from features of a sample's image and text, they find what a call of a whole model was not given."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ..arguments import check_choice, check_int
from ..config import CHOICES, TaskConfig
from .checks import reads_values
from .slices import SlicedParameter

FIXED_POINT = 2.0**40  # sums of normalised features are integers in this unit: exact, whatever their order


class Features(NamedTuple):
    """Features of n samples; their lengths do not matter."""

    image: Tensor | None  # (n, e_i); None: no sample has an image, a row of zeros: this one has none
    text: Tensor | None  # (n, e_t); None: there is no text


class Selector(nn.Module):
    """Finds arguments of a mixture's call that a forward or `generate()` of a whole model was not given.

    A model has one for each adapter, made by `Mixture.selector`. PEFT saves its tensors with the adapter's. So they
    must be parameters or buffers of the selector itself, not of a module within it, in shapes that the configuration
    determines.

    Attributes:
        finds: names of the arguments that it finds, among the layers' "task", "experts" and "weights".
    """

    finds: ClassVar[tuple[str, ...]] = ()

    @property
    def is_ready(self) -> bool:
        """Whether it can choose; if not, the model asks for the arguments."""
        raise NotImplementedError  # every selector has its own: there is no default

    @property
    def trains(self) -> bool:
        """Whether its parameters train with the adapter's; otherwise they are frozen."""
        return False

    def choose(self, features: Features) -> dict[str, Tensor]:
        """Return the arguments in `finds` for n samples.

        Raises:
            ValueError: the features do not fit.
        """
        raise NotImplementedError  # every selector has its own: there is no default

    def check(self, given: dict[str, Tensor]) -> None:
        """Check arguments in `finds` that an answering model was given.

        Raises:
            ValueError: they name what the adapter has not learned.
        """


class TaskSelector(Selector):
    """Chooses the task of a sample whose keys are nearest: argmax_t cos(e_img, k_img_t) + cos(e_txt, k_txt_t).

    A sample without an image is chosen by its text alone. The keys minimise BranchLoRA's alignment loss, the sum over a
    task's samples of [1 - cos(e_img, k_img)] + [1 - cos(e_txt, k_txt)]. With fixed features that has a closed form: the
    normalised mean of the normalised features.

    Args:
        num_tasks: number of tasks; None: as many as are added.
        image_dim: size of the image features; None: that of the first that are added, 0: there are no images.
        text_dim: size of the text features; None: that of the first that are added.
        keys: "closed", the closed form by `add`; or "trained", parameters that train by `forward`, the alignment loss.
            Keys of tasks that are not in a step keep their values under any optimiser.

    Raises:
        ValueError: an argument is not as above, or a size of trained keys is not given.
    """

    finds: ClassVar[tuple[str, ...]] = ("task",)
    learned: Tensor  # bool (num_tasks,), the tasks that have keys
    image_sums: Tensor  # int64 (num_tasks, e_i), of keys in closed form
    text_sums: Tensor

    def __init__(
        self,
        num_tasks: int | None = None,
        image_dim: int | None = None,
        text_dim: int | None = None,
        *,
        keys: str = "closed",
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        check_choice("keys", keys, CHOICES["keys"])
        sizes = {"num_tasks": num_tasks, "image_dim": image_dim, "text_dim": text_dim}
        for name, size in sizes.items():
            if size is not None or keys == "trained":
                check_int(name, size, least=0 if name == "image_dim" else 1)
        self.kind = keys
        self._grows = {name for name, size in sizes.items() if size is None}
        for part, dim in (("image", image_dim), ("text", text_dim)):
            shape = (num_tasks or 0, dim or 0)
            if keys == "trained":
                start = torch.randn(shape, device=device) / max(shape[1], 1) ** 0.5
                setattr(self, f"{part}_keys", SlicedParameter(start))
            else:
                self.register_buffer(f"{part}_sums", torch.zeros(shape, dtype=torch.int64, device=device))
        self.register_buffer("learned", torch.zeros(num_tasks or 0, dtype=torch.bool, device=device))

    @property
    def num_tasks(self) -> int:
        """Number of tasks, with and without keys."""
        return self.learned.shape[0]

    @property
    def is_ready(self) -> bool:
        return bool(self.learned.any())

    @property
    def trains(self) -> bool:
        return self.kind == "trained"

    def keys(self) -> tuple[Tensor, Tensor]:
        """Return the keys of image and text, float64 (num_tasks, e) of length 1; a row of zeros where there is none."""
        return nn.functional.normalize(self._of("image").double()), nn.functional.normalize(self._of("text").double())

    def _of(self, part: str) -> Tensor:
        """Return the tensor that keys are made of."""
        tensor: Tensor = getattr(self, f"{part}_keys" if self.kind == "trained" else f"{part}_sums")
        return tensor

    @classmethod
    def of_adapter(cls, config: TaskConfig, device: torch.device) -> TaskSelector:
        """Return the selector of a new adapter."""
        return cls(config.num_tasks, config.image_dim, config.instruction_dim, keys=config.keys, device=device)

    # ---- keys in closed form

    @torch.no_grad()
    def add(self, task: int, image_features: Tensor | None, text_features: Tensor | None) -> None:
        """Add samples to the keys of a task.

        The order of samples, and how they are cut into batches, changes no bit of the keys.

        Args:
            task: the task.
            image_features: (n, e_i), rows of zeros where a sample has no image; None if none has.
            text_features: (n, e_t); None: no text.

        Raises:
            TypeError, ValueError: an argument does not fit, or the keys are trained.
        """
        self.add_sums(task, *self.sums(image_features, text_features))

    @torch.no_grad()
    def sums(self, image_features: Tensor | None, text_features: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return what `add` adds for samples, int64 (e_i,) and (e_t,): integers, so processes can sum theirs exactly.

        Raises:
            TypeError, ValueError: as for `add`.
        """
        self._check_features(Features(image_features, text_features))
        found = []
        for part, features in (("image", image_features), ("text", text_features)):
            if features is None:
                features = self.learned.new_zeros((0, self._of(part).shape[1]), dtype=torch.float64)
            normal = nn.functional.normalize(features.double())
            found.append((normal * FIXED_POINT).round().long().sum(0).to(self.learned.device))
        return found[0], found[1]

    @torch.no_grad()
    def add_sums(self, task: int, image: Tensor, text: Tensor) -> None:
        """Add the results of `sums` to the keys of a task.

        Raises:
            ValueError: there is no such task, or the keys are trained.
        """
        if self.kind == "trained":
            raise ValueError("keys must be 'closed' for add(): this selector's keys are trained, by its forward")
        self._grow(task, image.shape[0], text.shape[0])
        self._check_task(task)
        for part, added in (("image", image), ("text", text)):
            if added.shape[0]:
                self._of(part)[task] += added
        self.learned[task] = True

    # ---- keys that are trained

    def forward(self, task: Tensor, image_features: Tensor | None, text_features: Tensor | None) -> Tensor:
        """Return the alignment loss of n samples, summed over them.

        Args:
            task: int64 (n,), the task of each sample.
            image_features, text_features: as for `add`.

        Raises:
            TypeError, ValueError: an argument does not fit, or the keys are not trained.
        """
        if self.kind != "trained":
            raise ValueError(
                "keys must be 'trained' for an alignment loss: this selector's have a closed form, see add()"
            )
        self._check_features(Features(image_features, text_features))
        loss = self.learned.new_zeros((), dtype=torch.float32)
        for part, features in (("image", image_features), ("text", text_features)):
            if features is not None:
                key = self._of(part).index_select(0, task)
                present = features.any(1)
                loss = loss + (present * (1 - nn.functional.cosine_similarity(features.to(key), key))).sum()
        self.learned.index_fill_(0, task, True)
        return loss

    # ---- choice

    @torch.no_grad()
    def select(self, image_features: Tensor | None = None, text_features: Tensor | None = None) -> Tensor:
        """Return the task of each sample, int64 (n,).

        Args:
            image_features: (n, e_i), rows of zeros where a sample has no image; None if none has.
            text_features: (n, e_t); None: no text.

        Raises:
            TypeError, ValueError: an argument does not fit, a sample has neither image nor text, or no task has keys.
        """
        if not self.is_ready:
            raise ValueError("select() needs the keys of a task: add(task, image_features, text_features) makes them")
        features = Features(image_features, text_features)
        self._check_features(features)
        present = [given for given in features if given is not None]
        if all(map(reads_values, present)) and not bool(torch.cat(present, 1).any(1).all()):
            raise ValueError("image_features or text_features must be given of every sample, got only zeros of one")
        device = present[0].device
        nearness = torch.zeros((present[0].shape[0], self.num_tasks), dtype=torch.float64, device=device)
        for given, key in zip(features, self.keys(), strict=True):
            if given is not None:
                nearness += nn.functional.normalize(given.double()).to(device) @ key.to(device).T
        return nearness.masked_fill(~self.learned.to(device), -torch.inf).argmax(1)

    def choose(self, features: Features) -> dict[str, Tensor]:
        return {"task": self.select(*features)}

    def check(self, given: dict[str, Tensor]) -> None:
        task = given["task"]
        if not reads_values(task) or not reads_values(self.learned) or not self.is_ready:
            return
        if not bool(self.learned[task].all()):
            known = self.learned.nonzero().flatten().tolist()
            raise ValueError(f"task_ids must be of tasks that the adapter has learned, {known}, got {task.tolist()}")

    # ---- checks and sizes

    def _check_task(self, task: int) -> None:
        """Check a task.

        Raises:
            ValueError: there is no such task.
        """
        check_int("task", task, least=0)
        if task >= self.num_tasks:
            raise ValueError(f"task must name one of the selector's, 0 to {self.num_tasks - 1}, got {task}")

    def _check_features(self, features: Features) -> None:
        """Check features.

        Raises:
            TypeError, ValueError: they are no floating point (n, e) with the keys' e, not finite, or there are none.
        """
        rows = {given.shape[0] for given in features if isinstance(given, Tensor) and given.dim() == 2}
        for part, given in features._asdict().items():
            if given is None:
                continue
            name = f"{part}_features"
            if not isinstance(given, Tensor) or not given.is_floating_point():
                got = f"dtype {given.dtype}" if isinstance(given, Tensor) else type(given).__name__
                raise TypeError(f"{name} must be a floating point tensor, got {got}")
            dim = self._of(part).shape[1]
            is_open = f"{part}_dim" in self._grows and not dim
            if given.dim() != 2 or len(rows) > 1 or not (is_open or given.shape[1] == dim):
                size = "e" if is_open else dim
                raise ValueError(f"{name} must have shape (n, {size}), a row for each sample, got {tuple(given.shape)}")
            if reads_values(given) and not bool(given.isfinite().all()):
                raise ValueError(f"{name} must be finite, got NaN or infinity")
        if not rows:
            raise ValueError("image_features or text_features must be given, got neither")

    def _grow(self, task: int, image_dim: int, text_dim: int) -> None:
        """Make room for a task and for features of these sizes, where the sizes were left open."""
        check_int("task", task, least=0)
        tasks = max(self.num_tasks, task + 1) if "num_tasks" in self._grows else self.num_tasks
        for part, dim in (("image", image_dim), ("text", text_dim)):
            self._resize(f"{part}_sums", (tasks, self._of(part).shape[1] or dim))
        self._resize("learned", (tasks,))

    def _resize(self, name: str, shape: tuple[int, ...]) -> None:
        """Pad a buffer with zeros to a shape."""
        old: Tensor = getattr(self, name)
        if tuple(old.shape) != shape:
            new = old.new_zeros(shape)
            new[tuple(map(slice, old.shape))] = old
            setattr(self, name, new)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Load keys, taking their sizes where those were left open."""
        if self._grows:
            for name in ("image_sums", "text_sums", "learned"):
                if f"{prefix}{name}" in state_dict:
                    setattr(self, name, torch.zeros_like(state_dict[f"{prefix}{name}"], device=self.learned.device))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        sizes = {part: self._of(part).shape[1] for part in ("image", "text")}
        return f"num_tasks={self.num_tasks}, image_dim={sizes['image']}, text_dim={sizes['text']}, keys={self.kind!r}"
