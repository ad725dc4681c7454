"""Teachers that distillbench trains on the run's dataset and caches.

The cache key is the recipe: the dataset's hash, network, schedule and training, and on a GPU whether TF32 was used.
Weights are first looked up among those shipped with distillbench, then in the cache of the results folder. Only if both
lack them is the teacher trained, once. ``teacher.path=FILE`` loads a given file instead.

Training is denoising score matching: minimise E |target(x_0, eps, t) - network(x_t, t, c)|^2 over t uniform in
[t_min, t_max], with the target of the network's parameterisation (v: Salimans & Ho 2022, appendix D). A conditional
teacher drops one label in ten, so that it supports guidance (Ho & Salimans 2021, algorithm 1).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import reprlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from distillbench import Batch, Denoiser, Method, Teacher, TeacherConfig, TeacherSource, UserError, hookimpl, option
from distillbench.diffusion.conditioning import Condition, Conditioning
from distillbench.diffusion.denoiser import TARGETS
from distillbench.diffusion.schedules import SCHEDULES
from distillbench.errors import quoted
from distillbench.networks.architectures import NETWORKS, SIZED, read_architecture
from distillbench.options import plain_settings, require_between, require_one_of, require_positive
from distillbench.storage.checksummed import read_tensors, write_tensors
from distillbench.storage.files import canonical_json, git_lfs_pointer, key_of, sha256_tensors
from distillbench.system.environment import device_name
from distillbench.system.progress import Progress
from distillbench.teachers.diffusers_schedulers import unknown_keys
from distillbench.teachers.teacher import TeacherPlan
from distillbench.training.budget import BudgetConfig, Limit, Meter
from distillbench.training.compute import ComputeConfig, applied, check_tf32
from distillbench.training.data_stream import DataStream
from distillbench.training.loop import Loop, train
from distillbench.training.optimizer_config import OptimizerConfig
from distillbench.training.pairs import Workspace
from distillbench.training.resume import Resume, States

SHIPPED = Path(__file__).resolve().parent.parent / "weights"
METADATA = "distillbench_teacher"
FORMAT = 1
MLP_UP_TO = 16  # pixels per side
LARGEST, LONGEST = 65536, 64  # most that a number in a recipe may be, and most entries of a list
DEEPEST, DEPTHS = 128, ("depth", "layers_per_block", "num_layers")  # most layers, and the settings that count them
KEPT_STATES, SECONDS_BETWEEN_STATES = 2, 300.0  # resume states of a teacher's training
FORGOTTEN = 0.1  # probability of dropping a label


@dataclass
class TeacherTraining(OptimizerConfig):
    """How a teacher is optimised."""

    ema_halflife_kimg: float = option(300.0, "half-life of the weight average in 1000 images; 0: no average")


class DenoisingTraining(Method):
    """Denoising score matching, which trains the teacher in the same loop as the methods."""

    name = "denoising"
    Config = TeacherTraining  # type: ignore[assignment]  # no setting of a method applies to a teacher
    paper = "Ho et al. 2020, arXiv:2006.11239; v-prediction: Salimans & Ho 2022, arXiv:2202.00512"
    needs_data = True
    student: Denoiser

    def train_step(self, batch: Batch) -> Iterator[tuple[nn.Module, Tensor]]:
        student, schedule = self.student, self.teacher.schedule
        x_0, eps = batch.x_0, batch.noise()
        t = batch.uniform(schedule.t_min, schedule.t_max)
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        target = TARGETS[student.prediction](x_0, eps, alpha, sigma)
        output = student.output(alpha * x_0 + sigma * eps, t, self.forget_some(batch))
        yield student, (output - target).square().mean()

    def forget_some(self, batch: Batch) -> Condition:
        """The classes of a batch, some of them replaced by the class that means none."""
        labels = batch.c.labels
        if labels is None:
            return batch.c
        forgotten = batch.uniform().flatten() < FORGOTTEN
        return Condition(labels.masked_fill(forgotten, self.teacher.conditioning.classes))

    def sample(self, noise, nfe: int, c: Condition) -> Tensor:
        raise NotImplementedError("a teacher is sampled by distillbench's own samplers")


class Trained(TeacherSource):
    """A network that distillbench trained on the dataset, from the cache or trained now."""

    name = "trained"

    @dataclass
    class Config(TeacherConfig):
        path: str = option(
            "", "safetensors file written by `distillbench teacher train`; empty: from the cache, or trained", path=True
        )
        network: str = option("auto", f"mlp, unet, dit, or auto: mlp up to {MLP_UP_TO} pixels per side, else unet")
        width: int = option(0, "channels; 0: the network's default (mlp 256, unet 64, dit 384)")
        depth: int = option(0, "blocks; 0: the network's default (mlp 4, unet 2 per level, dit 8)")
        architecture: str = option(
            "", "config.json of a diffusers UNet2DModel or DiTTransformer2DModel to use instead", path=True
        )
        prediction: str = option("v", f"what the network predicts: {', '.join(TARGETS)}")
        schedule: str = option("vp_cosine", f"noise schedule: {', '.join(SCHEDULES)}")
        seed: int = option(0, "seed of the teacher's training")
        batch_size: int = option(256, "images in a training step")
        flip: bool = option(False, "flip half of the images of its training left to right")
        tf32: bool = option(False, "on a GPU, float32 products and convolutions may round their factors to 10 bits")
        budget: BudgetConfig = dataclasses.field(
            default_factory=lambda: BudgetConfig(images=2_000_000), metadata={"help": "how long the teacher trains"}
        )
        optimizer: TeacherTraining = option(TeacherTraining, "how the teacher is optimised")

        def __post_init__(self) -> None:
            require_one_of(self, "network", ("auto", *SIZED))
            if self.architecture and (self.network != "auto" or self.width or self.depth):
                raise UserError(
                    "architecture describes the whole network: leave network, width and depth at their defaults"
                )
            require_one_of(self, "prediction", TARGETS)
            require_one_of(self, "schedule", SCHEDULES)
            require_positive(self, "batch_size")
            require_between(self, 0, 65536, "width", "depth")
            require_between(self, 0, 2**63 - 1, "seed")

    def notes(self) -> Sequence[str]:
        if not self.config.architecture:
            return ()
        file = Path(self.config.architecture)
        config = read_architecture(file, "teacher.architecture")
        cls = str(config.get("_class_name"))
        keys = unknown_keys(config, cls)
        return [f"{file.name}: {cls} has no parameter {', '.join(keys)}: ignored"] if keys else []

    def plan(self) -> TeacherPlan:
        if self.config.tf32:
            check_tf32("teacher.tf32=true", self.device)
        file = self._file()
        if file is not None:
            self._read(file, "cpu")
            return TeacherPlan(str(file.name))
        if not len(self.dataset):
            raise UserError(f"teacher=trained must be trained first, but dataset={self.dataset.name} has no images")
        budget, size = self.config.budget, self.config.batch_size
        images = budget.nfe if budget.limit == Limit.nfe else budget.images  # an image takes one evaluation
        seconds = budget.seconds if budget.limit == Limit.seconds else None
        return TeacherPlan("to be trained", images, images, size, seconds, f"teacher.budget.{budget.limit.value}")

    def untrained(self) -> Teacher:
        file = self._file()
        recipe = self.recipe() if file is None else _read_recipe(file, self.dataset.shape, self.conditioning.classes)
        return self._untrained(recipe)

    def _untrained(self, recipe: dict[str, Any]) -> Teacher:
        return Teacher(
            self.name,
            _denoiser(recipe).to(self.device),
            self.dataset.shape,
            "untrained",
            recipe,
            Conditioning(self.conditioning.classes),
            blank=lambda: _network(recipe),
        )

    def _read(self, file: Path, device: str) -> Teacher:
        return read_teacher(file, self.dataset.shape, self.conditioning.classes, device)

    def load(self, progress: Progress) -> Teacher:
        file = self._file()
        if file is None:
            file = self.train(None, progress)
        return self._read(file, self.device)

    def recipe(self) -> dict[str, Any]:
        """Everything that the weights depend on, as plain values; on a GPU also `tf32`."""
        return self._recipe(on_gpu=self.device != "cpu")

    def _recipe(self, on_gpu: bool) -> dict[str, Any]:
        plain: dict[str, Any] = plain_settings(self.config)
        if not on_gpu:
            del plain["tf32"]
        if not self.config.flip:
            del plain["flip"]
        for name in ("kind", "path", "network", "width", "depth", "architecture"):
            del plain[name]
        if self.conditioning.classes:
            plain |= {"classes": self.conditioning.classes, "forgotten": FORGOTTEN}
        return plain | {
            "format": FORMAT,
            "network": self._architecture(),
            "shape": list(self.dataset.shape),
            "dataset": self.dataset.name,
            "dataset_sha256": self.dataset.sha256,
        }

    def _architecture(self) -> dict[str, Any]:
        """The network's name and sizes, as plain values."""
        config = self.config
        if config.architecture:
            return {"name": "diffusers", "config": read_architecture(Path(config.architecture), "teacher.architecture")}
        name, size = network_of_size(config.network, config.width, config.depth, self.dataset.shape)
        return {"name": name, **size}

    def _name(self, recipe: dict[str, Any]) -> str:
        """The file name of the weights of a recipe."""
        return f"{self.dataset.name}-{key_of(recipe)}.safetensors"

    def _places(self) -> Iterator[Path]:
        """Where a teacher of this recipe may be: shipped, trained on this kind of device, or on the other kind.

        Older files do not record their device and have the name of those from CPUs. On a GPU they are ignored, because
        they may have been trained on a GPU with torch's default, TF32 in convolutions.
        """
        cpu, gpu = self._name(self._recipe(on_gpu=False)), self._name(self._recipe(on_gpu=True))
        if not self.config.tf32:
            yield SHIPPED / cpu
        if self.device == "cpu":
            yield from (self.cache / cpu, self.cache / gpu)
            return
        yield self.cache / gpu
        if not self.config.tf32 and _made_on(self.cache / cpu) == "cpu":
            yield self.cache / cpu

    def _file(self) -> Path | None:
        if self.config.path:
            if Path(self.config.path).is_dir():
                raise UserError(
                    f"teacher.path: {self.config.path!r} is a folder, but teacher=trained reads a file that "
                    "`distillbench teacher train` wrote. For a diffusers pipeline: teacher=diffusers"
                )
            if not Path(self.config.path).is_file():
                raise UserError(f"teacher.path: no file {self.config.path!r}")
            return Path(self.config.path)
        return next((file for file in self._places() if file.is_file() and self._readable(file)), None)

    def _readable(self, file: Path) -> bool:
        """Whether `file` holds a teacher. If not, it counts as missing and the teacher is trained again."""
        try:
            self._read(file, "cpu")
        except UserError:
            return False
        return True

    def train(self, output: Path | None, progress: Progress) -> Path:
        recipe, config = self.recipe(), self.config
        kept = self.cache / self._name(recipe)
        file = output or kept
        progress.say(f"training the teacher on {self.dataset.name}")
        torch.manual_seed(config.seed)  # for the initial weights
        fresh = self._untrained(recipe)
        method = DenoisingTraining(config.optimizer, fresh).to(self.device)
        workspace = Workspace(
            fresh, Meter(config.budget, fresh, self.device), self.cache, self.device, config.seed, progress
        )
        compute = ComputeConfig(tf32=config.tf32)
        ahead = 0 if self.device == "cpu" else compute.prefetch
        states = States(kept.with_suffix(".states"), KEPT_STATES, progress)
        with ExitStack() as stack:
            data = DataStream(self.dataset, config.seed, self.device, ahead, flip=config.flip)
            stack.callback(data.close)
            step = stack.enter_context(progress.step(f"teacher on {self.dataset.name}"))
            stack.enter_context(applied(compute, method, self.device))
            resume = Resume(states, SECONDS_BETWEEN_STATES, {"order": data})
            loop = Loop(config.batch_size)
            trained = train(method, config.optimizer, workspace, data.read, loop, step, resume=resume)
        tensors = {k: v.detach().cpu().contiguous() for k, v in method.student.network.state_dict().items()}
        cost = {"images": trained.cost.images, "seconds": round(trained.cost.seconds, 1)}
        about = {"recipe": recipe, "cost": cost, "final_loss": trained.curve[-1].loss}
        metadata = {METADATA: json.dumps(about | {"device": device_name(self.device)})}
        write_tensors(file, tensors, metadata)
        states.clear()
        progress.say(f"teacher trained: {cost['images']} images, {cost['seconds']} s")
        return file


def network_of_size(name: str, width: int, depth: int, shape: tuple[int, int, int]) -> tuple[str, dict[str, int]]:
    """The network's name and the sizes that are not at their default."""
    if name == "auto":
        name = "mlp" if max(shape[1:]) <= MLP_UP_TO else "unet"
    return name, {k: v for k, v in (("width", width), ("depth", depth)) if v}


def read_teacher(file: Path, shape: tuple[int, int, int], classes: int, device: str) -> Teacher:
    """The frozen teacher in `file`. Raises UserError if it is damaged or was trained on other images or classes."""
    recipe = _read_recipe(file, shape, classes)
    try:
        weights = read_tensors(file, needs_checksum=False)
        _check_shapes(recipe, weights)
        denoiser = _denoiser(recipe)
        denoiser.network.load_state_dict(weights)
        reading = canonical_json({name: recipe[name] for name in ("network", "shape", "schedule", "prediction")})
    except (RuntimeError, ValueError) as error:
        why = str(error).splitlines()[0]
        raise UserError(f"the teacher's weights in {file.name!r} cannot be used: {why}") from error
    sha256 = hashlib.sha256(f"{sha256_tensors(weights)} {reading}".encode()).hexdigest()
    blank = lambda: _network(recipe)
    return Teacher(Trained.name, denoiser.to(device), shape, sha256, recipe, Conditioning(classes), blank=blank)


def _check_shapes(recipe: dict[str, Any], weights: dict[str, Tensor]) -> None:
    """Raise an error, before allocating memory, if `weights` do not match the network of `recipe`."""
    _check_numbers(recipe["network"])
    with torch.device("meta"):
        blank = _denoiser(recipe).network
    blank.load_state_dict({name: tensor.to("meta") for name, tensor in weights.items()}, assign=True)


def _check_numbers(value: Any, name: str = "") -> None:
    """Raise UserError for implausibly large numbers or lists in a recipe."""
    named = (
        value.items()
        if isinstance(value, dict)
        else ((name, part) for part in value)
        if isinstance(value, list)
        else ()
    )
    most = DEEPEST if name in DEPTHS else LARGEST
    if (isinstance(value, dict | list) and len(value) > LONGEST) or (
        isinstance(value, int | float) and not -most <= value <= most
    ):
        raise UserError(f"the teacher's recipe cannot be built: {name or 'it'} is {quoted(reprlib.repr(value))}")
    for key, part in named:
        _check_numbers(part, key)


def _read_recipe(file: Path, shape: tuple[int, int, int], classes: int) -> dict[str, Any]:
    try:
        with open(file, "rb") as start:
            if why := git_lfs_pointer(start.read(64)):
                raise OSError(why)
        with safe_open(file, framework="pt") as tensors:
            recipe = json.loads((tensors.metadata() or {})[METADATA])["recipe"]
        theirs, known = tuple(recipe["shape"]), int(recipe.get("classes", 0))
        if not isinstance(recipe["network"], dict):
            raise TypeError("its network is not a dict")
    except (SafetensorError, OSError, RuntimeError) as error:
        raise UserError(f"teacher.path: {file.name!r} is not a readable safetensors file: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        message = (
            f"teacher.path: {file.name!r} was not written by `distillbench teacher train`: it has no recipe. For a "
            "diffusers checkpoint: teacher=diffusers teacher.path=FOLDER"
        )
        raise UserError(message) from error
    if theirs != tuple(shape):
        raise UserError(
            f"the teacher does not fit the dataset: its images are (C,H,W) = {theirs}, the dataset's are {shape}"
        )
    if known != classes:
        wanted = f"conditional=true with {classes} classes" if classes else "conditional=false"
        raise UserError(f"the teacher in {file.name!r} has {known or 'no'} classes and does not support {wanted}")
    return recipe


def _made_on(file: Path) -> str:
    """The kind of device that the teacher in `file` was trained on; "" if the file is missing or does not record it."""
    try:
        with safe_open(file, framework="pt") as tensors:
            return str(json.loads((tensors.metadata() or {})[METADATA])["device"]).partition(" ")[0]
    except (SafetensorError, OSError, RuntimeError, KeyError, TypeError, ValueError, RecursionError):
        return ""


def _network(recipe: dict[str, Any]) -> nn.Module:
    """The network of a recipe with random weights."""
    network = dict(recipe["network"])
    build = NETWORKS[network.pop("name")]
    return build(tuple(recipe["shape"]), classes=int(recipe.get("classes", 0)), **network)


def _denoiser(recipe: dict[str, Any]) -> Denoiser:
    """The network of a recipe as a denoiser. Raises UserError if the recipe is not supported."""
    try:
        return Denoiser(_network(recipe), SCHEDULES[recipe["schedule"]](), recipe["prediction"])
    except (ArithmeticError, AttributeError, LookupError, NotImplementedError, TypeError, ValueError) as error:
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"the teacher's recipe cannot be built: {why}") from error


@hookimpl(api=2)
def register_teachers(register) -> None:
    register(Trained)
