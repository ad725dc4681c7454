"""Teachers in diffusers' format: a local folder with model_index.json, or a repository on the hub.

Only data is read from a pipeline: its configs and safetensors. Network and autoencoder are built by diffusers' own
classes, chosen from a fixed list. Code in a pipeline is never run, and pickled weights (.bin) are refused. The
scheduler's config becomes a noise schedule and a parameterisation (:mod:`distillbench.teachers.diffusers_schedulers`).

| pipeline                                     | network               | autoencoder             | classes |
|----------------------------------------------|-----------------------|-------------------------|---------|
| DDPMPipeline, DDIMPipeline, ScoreSdeVe, ...  | UNet2DModel           |                         | maybe   |
| LDMPipeline                                  | UNet2DModel           | VQModel, AutoencoderKL  | maybe   |
| DiTPipeline                                  | DiTTransformer2DModel | AutoencoderKL           | yes     |
| ConsistencyModelPipeline, of ``consistency`` | UNet2DModel           |                         | maybe   |
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from distillbench import Denoiser, Teacher, TeacherConfig, TeacherSource, UserError, hookimpl, option
from distillbench.diffusion.conditioning import Conditioning
from distillbench.errors import LONGEST_REASON, quoted, unsupported
from distillbench.networks.diffusers_wrappers import AUTOENCODERS, NETWORKS, DiffusersNetwork, check_classes
from distillbench.options import require_one_of
from distillbench.storage.files import canonical_json, sha256_file
from distillbench.storage.safetensors_headers import missing_tensors, tensor_shapes, unread_tensors
from distillbench.system.progress import Progress
from distillbench.teachers.diffusers_schedulers import SchedulerReading, read_config, unknown_keys, with_defaults
from distillbench.teachers.teacher import CLIPS, Clip, PipelineFolder, TeacherPlan

INDEX = "model_index.json"
LARGEST_JSON = 2**26  # bytes
LARGEST, LONGEST = 2**20, 4096  # most that a number in a config may be, and most entries of a list
DEEPEST = 512  # most layers
DEPTHS = (  # settings that count layers
    "layers_per_block",
    "num_layers",
    "num_hidden_layers",
    "num_decoder_layers",
    "transformer_layers_per_block",
)
PICKLED = (".pt", ".pth", ".ckpt", ".bin", ".pkl")
WEIGHTS = (".safetensors", *PICKLED)
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
VARIANT = re.compile(r"[\w-]*")

# By library: the file name of a component's weights without ".safetensors".
LIBRARIES = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}

# The supported classes of components, and their library.
COMPONENTS = {
    **dict.fromkeys((*NETWORKS, *AUTOENCODERS), "diffusers"),
    "CLIPTextModel": "transformers",
    "CLIPTextModelWithProjection": "transformers",
    "T5EncoderModel": "transformers",
}
DENOISERS = ("unet", "transformer")  # names of the network in pipelines
DECODERS = ("vae", "vqvae")  # names of the autoencoder


# --- a pipeline's folder ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Index:
    """The content of model_index.json: the class of the pipeline and of each of its components."""

    folder: Path
    name: str  # the folder's name or the name on the hub, for messages and records
    pipeline: str
    components: dict[str, str]

    def component(self, names: tuple[str, ...], possible: list[str] | None = None) -> str:
        """The first of `names` that the pipeline has. Raises UserError if it has none, or one of another class."""
        for name in names:
            if name in self.components:
                if possible is not None and self.components[name] not in possible:
                    where = f" as {name} of the {self.pipeline} in {self.name!r}"
                    raise unsupported("class", self.components[name], possible, where)
                return name
        raise UserError(f"the {self.pipeline} in {self.name!r} has no {' or '.join(names)}")

    def place(self, component: str) -> Path:
        """The folder of a component, which in old pipelines is the pipeline's own folder."""
        own = self.folder / component
        return own if own.is_dir() else self.folder

    def config(self, component: str) -> dict[str, Any]:
        """A component's config as in its file."""
        config = read_json(self.place(component) / "config.json", self.name)
        _check_numbers(config, f"config.json of {component} of {self.name!r}")
        return config

    def full_config(self, component: str) -> dict[str, Any]:
        """A diffusers component's config with the defaults of its class."""
        return with_defaults(self.components[component], self.config(component))


def read_index(folder: Path, name: str = "") -> Index:
    """The index of the pipeline in `folder`. Raises UserError if there is none."""
    name = name or folder.name
    if not (folder / INDEX).is_file():
        raise UserError(f"teacher.path: {name!r} is not a diffusers pipeline: it has no {INDEX}")
    plain = read_json(folder / INDEX, name)
    components = {
        key: str(value[1])
        for key, value in plain.items()
        if isinstance(value, list) and len(value) == 2 and value[1] is not None
    }
    return Index(folder, name, str(plain.get("_class_name")), components)


def read_json(file: Path, name: str) -> dict[str, Any]:
    """The JSON object in `file`. Raises UserError, with the pipeline's `name`, if there is none."""
    try:
        if file.stat().st_size > LARGEST_JSON:
            raise ValueError(f"it has more than {LARGEST_JSON:,} bytes")
        plain = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"teacher.path: cannot read {file.name} of {name!r}: {error}") from error
    if not isinstance(plain, dict):
        raise UserError(f"teacher.path: {file.name} of {name!r} is not a JSON object")
    return plain


def _check_numbers(value: Any, where: str, name: str = "") -> None:
    """Raise UserError for implausibly large numbers or lists in a config."""
    if isinstance(value, dict):
        for key, part in value.items():
            _check_numbers(part, where, key)
    elif isinstance(value, list):
        if len(value) > LONGEST:
            raise UserError(f"teacher.path: {where}: {quoted(name)} has {len(value):,} values, at most {LONGEST:,}")
        for part in value:
            _check_numbers(part, where, name)
    elif isinstance(value, int | float):
        most = DEEPEST if name in DEPTHS else LARGEST
        if not -most <= value <= most:
            raise UserError(f"teacher.path: {where}: {quoted(name)} is {quoted(str(value))}, at most {most:,}")


def read_schedule(index: Index) -> tuple[SchedulerReading, dict[str, Any]]:
    """How to use the pipeline's network, and the scheduler's config from which that follows."""
    config = read_json(index.place("scheduler") / "scheduler_config.json", index.name)
    return read_config(config), config


# --- weights ---------------------------------------------------------------------------------------------------------


def weights_files(index: Index, component: str, variant: str = "") -> list[Path]:
    """The safetensors files of a component. Raises UserError if some are missing, or only pickled ones exist."""
    place = index.place(component)
    base, suffix = LIBRARIES[library(index, component)], f".{variant}" if variant else ""
    whole = place / f"{base}{suffix}.safetensors"
    if whole.is_file():
        return [whole]
    parts = place / f"{base}.safetensors.index{suffix}.json"
    if parts.is_file():
        weight_map = read_json(parts, index.name).get("weight_map")
        names = set(map(str, weight_map.values())) if isinstance(weight_map, dict) else set()
        for name in names:
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise UserError(
                    f"teacher.path: {parts.name} of {index.name!r} names {quoted(name)}. Possible: .safetensors files "
                    "in the same folder"
                )
        files = [place / name for name in sorted(names)]
        missing = [file.name for file in files if not file.is_file()]
        if files and not missing:
            return files
        raise UserError(f"teacher.path: {component} of {index.name!r} lacks {', '.join(missing) or 'all its weights'}")
    raise UserError(
        f"teacher.path: {component} of {index.name!r} has no weights {whole.name}{_alternatives(place, base)}"
    )


def _alternatives(place: Path, base: str) -> str:
    """What a folder without the expected file holds, as the end of a message."""
    found = sorted(place.glob(f"{base}*.safetensors"))
    if found:
        names = ", ".join(file.name for file in found)
        return f". Found: {names} (teacher.variant selects the part before .safetensors)"
    if list(place.glob(f"{base}*.bin")):
        return (
            ". Its .bin file is a pickle, which can run code, and is not read. If you trust it, convert it: "
            "DiffusionPipeline.from_pretrained(FOLDER, use_safetensors=False).save_pretrained(NEW)"
        )
    return ""


def library(index: Index, component: str) -> str:
    """The library of a component's class. Raises UserError for an unsupported class."""
    name = index.components[component]
    if name not in COMPONENTS:
        raise unsupported("class", name, COMPONENTS, f" as {component} of the {index.pipeline} in {index.name!r}")
    return COMPONENTS[name]


def _class(index: Index, component: str) -> Any:
    import diffusers

    name = index.components[component]
    if library(index, component) == "diffusers":
        return getattr(diffusers, name)
    try:
        import transformers
    except ImportError as error:
        raise UserError(f"{name} needs the library transformers: pip install 'distillbench[text]'") from error
    return getattr(transformers, name)


def load_component(index: Index, component: str, variant: str = "") -> Any:
    """A component with its weights, on the CPU in the default dtype. Raises UserError if the weights do not fit."""
    from diffusers.utils import is_accelerate_available

    weights_files(index, component, variant)
    settings: dict[str, Any] = {"local_files_only": True, "use_safetensors": True, "output_loading_info": True}
    if variant:
        settings["variant"] = variant
    ours = library(index, component) == "diffusers"
    if ours:
        settings |= {"low_cpu_mem_usage": is_accelerate_available(), "torch_dtype": torch.get_default_dtype()}
    _check_size(index, component, variant)
    try:
        module, info = _class(index, component).from_pretrained(str(index.place(component)), **settings)
    except Exception as error:  # these libraries raise many types for damaged files
        raise _unusable(index, component, first_line(error)) from error
    if lost := [*info["missing_keys"], *info["mismatched_keys"]]:
        raise _unusable(index, component, f"{len(lost)} tensors are missing or of another shape, such as {lost[0]}")
    return module if ours else module.to(torch.get_default_dtype())


def check_component(index: Index, component: str, variant: str = "") -> list[str]:
    """Raise UserError unless the headers of a component's files list all its tensors.

    Returns a note if they list more: the config may then describe another network than the weights belong to.
    """
    try:
        shapes = tensor_shapes(weights_files(index, component, variant))
    except ValueError as error:
        raise _unusable(index, component, str(error)) from error
    _check_size(index, component, variant)
    with torch.device("meta"):
        network = blank_component(index, component)
    whole_models = library(index, component) == "transformers"  # whose files may contain more parts
    if lost := missing_tensors(network, shapes, prefixed=whole_models):
        raise _unusable(index, component, f"{len(lost)} tensors are missing or of another shape, such as {lost[0]}")
    more = [] if whole_models else unread_tensors(network, shapes)
    if not more:
        return []
    where = f"the weights of {component} of {index.name!r}"
    return [f"{where} have {len(more)} tensors that its config does not describe, such as {more[0]}: ignored"]


def unread_settings(index: Index, components: Iterable[str]) -> list[str]:
    """Notes on settings in a pipeline's configs that their classes have no parameter for."""
    scheduler = read_json(index.place("scheduler") / "scheduler_config.json", index.name)
    configs = [("scheduler_config.json", str(scheduler.get("_class_name")), scheduler)]
    configs += [(f"config.json of {name}", index.components[name], index.config(name)) for name in components]
    return [
        f"{file} of {index.name!r}: {cls} has no parameter {', '.join(keys)}: ignored"
        for file, cls, config in configs
        if (keys := unknown_keys(config, cls))
    ]


def _check_size(index: Index, component: str, variant: str) -> None:
    """Raise UserError, before allocating memory, if a component is larger than its files of weights."""
    with torch.device("meta"):
        described = sum(tensor.numel() for tensor in blank_component(index, component).parameters())
    held = sum(file.stat().st_size for file in weights_files(index, component, variant))
    if described > held:  # a number takes at least one byte
        raise _unusable(
            index, component, f"its config describes {described:,} numbers, but its files have {held:,} bytes"
        )


def blank_component(index: Index, component: str) -> Any:
    """A component with random weights from torch's global generator."""
    config, cls = index.config(component), _class(index, component)
    ours = library(index, component) == "diffusers"
    try:
        return cls.from_config(config) if ours else cls(cls.config_class.from_dict(config))
    except Exception as error:  # many types for an invalid config
        raise _unusable(index, component, first_line(error)) from error


def first_line(error: Exception) -> str:
    """The first line of an error's message."""
    return next(iter(str(error).splitlines()), type(error).__name__)[:LONGEST_REASON]


def _unusable(index: Index, component: str, why: str) -> UserError:
    return UserError(f"teacher.path: {component} of {index.name!r} cannot be used: {why}")


def identity(index: Index, components: list[str], variant: str, reading: SchedulerReading) -> str:
    """SHA-256 over the reading, the configs of the components and the bytes of their weight files."""
    configs = {name: index.config(name) for name in components}
    plain = {name: _plain({k: v for k, v in config.items() if k[:1] != "_"}) for name, config in configs.items()}
    hashes = [sha256_file(file) for name in components for file in weights_files(index, name, variant)]
    return hashlib.sha256(canonical_json([reading.plain, plain, hashes]).encode()).hexdigest()


# --- the hub ---------------------------------------------------------------------------------------------------------


def hub_folder(name: str, repository: str, revision: str, download: bool, patterns: list[str]) -> Path:
    """The local folder of a repository on the hub with the files that match `patterns`.

    Missing files are downloaded only with `download`; otherwise the hub's local cache is used. `name` is the teacher's.
    """
    if not HUB_ID.fullmatch(repository):
        raise UserError(f"teacher.path: no folder {repository!r}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                repository, revision=revision or None, local_files_only=not download, allow_patterns=patterns
            )
        )
    except LocalEntryNotFoundError as error:
        if download:
            raise UserError(f"teacher.path: cannot fetch {repository!r} from the hub: {first_line(error)}") from error
        raise UserError(
            f"teacher.path: no folder {repository!r}. If it is a repository on the hub, allow its download: "
            f"teacher={name} teacher.path={repository} teacher.download=true"
        ) from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise UserError(f"teacher.path: cannot fetch {repository!r} from the hub: {first_line(error)}") from error


def patterns_of(components: tuple[str, ...], variant: str) -> list[str]:
    """File name patterns for the weights of `components`."""
    suffix = f".{variant}" if variant else ""
    return [
        f"{place}{base}{part}.safetensors"
        for place in ("", *(f"{component}/" for component in components))
        for base in LIBRARIES.values()
        for part in (suffix, f"{suffix}-?????-of-?????")
    ]


# --- teachers --------------------------------------------------------------------------------------------------------


@dataclass
class PipelineConfig(TeacherConfig):
    """Settings of all teachers that are diffusers pipelines."""

    path: str = option("", "a pipeline's folder (with model_index.json), or its name on the hub (required)", path=True)
    download: bool = option(False, "allow downloads from the hub")
    revision: str = option("", "branch, tag or commit on the hub; empty: the main branch")
    variant: str = option("", "variant of the weights, as in diffusion_pytorch_model.VARIANT.safetensors: fp16, ...")

    def __post_init__(self) -> None:
        if not VARIANT.fullmatch(self.variant):
            raise UserError(f"variant must be letters, digits, - and _, got {self.variant!r}")


def find_index(teacher: str, config: PipelineConfig, path: str, patterns: Sequence[str]) -> Index:
    """The index of the pipeline at `path`. From the hub, the files that match `patterns` are fetched too."""
    if not path:
        raise UserError(f"teacher={teacher} needs teacher.path=FOLDER, a folder with {INDEX}")
    if Path(path).is_dir():
        return read_index(Path(path), Path(path).resolve().name)
    _check_no_file(teacher, path)
    return read_index(hub_folder(teacher, path, config.revision, config.download, list(patterns)), path)


def _check_no_file(teacher: str, path: str) -> None:
    """Raise UserError with advice if `path` is a file, or has the suffix of a file of weights."""
    suffix = Path(path).suffix.lower()
    if not Path(path).is_file():
        if suffix in WEIGHTS:
            raise UserError(f"teacher.path: no file {path!r}; teacher={teacher} reads a folder with {INDEX}")
        return
    message = f"teacher.path: {path!r} is a file, but teacher={teacher} reads a pipeline's folder with {INDEX}"
    if Path(path).name in (INDEX, "config.json"):
        raise UserError(f"{message}: give the folder {str(Path(path).parent)!r}")
    pickled = f". A {suffix} file is a pickle, which can run code, and is not read" if suffix in PICKLED else ""
    raise UserError(
        f"{message}{pickled}. diffusers converts a whole model in one file that you trust into a folder, as by "
        "StableDiffusionPipeline.from_single_file(FILE).save_pretrained(FOLDER). A file of `distillbench teacher "
        "train` is read by teacher=trained, a .pkl of EDM by teacher=edm"
    )


class Diffusers(TeacherSource):
    """A diffusers pipeline in pixel or latent space, unconditional or class-conditional."""

    name = "diffusers"
    families: ClassVar[tuple[str, ...]] = ("discrete", "flow", "score", "edm")  # supported families of schedulers
    _unread: Sequence[str] = ()  # notes on ignored settings in the configs, set by plan()

    @dataclass
    class Config(PipelineConfig):
        clip: str = option(
            "auto", "clipping of data predictions: none, static, dynamic; auto: as in the scheduler's config"
        )

        def __post_init__(self) -> None:
            super().__post_init__()
            require_one_of(self, "clip", ("auto", "none", *(clip for clip in CLIPS if clip)))

    def plan(self) -> TeacherPlan:
        index = self._index(weights=False)
        self._check(index)
        self._unread = unread_settings(index, self._components(index))
        if not self._on_hub():
            for component in self._components(index):
                self._unread = [*self._unread, *check_component(index, component, self.config.variant)]
        return TeacherPlan(index.name)

    def notes(self) -> Sequence[str]:
        return self._unread

    def untrained(self) -> Teacher:
        index = self._index(weights=False)
        modules = {name: blank_component(index, name) for name in self._components(index)}
        return self._teacher(index, modules, "untrained")

    def load(self, progress: Progress) -> Teacher:
        index = self._index(weights=True)
        reading = self._check(index)
        components = self._components(index)
        modules = {name: load_component(index, name, self.config.variant) for name in components}
        return self._teacher(index, modules, identity(index, components, self.config.variant, reading))

    def pipeline(self) -> PipelineFolder:
        return PipelineFolder(self._index(weights=True).folder, self.config.variant)

    def _on_hub(self) -> bool:
        return not Path(self.config.path).is_dir()

    def _index(self, weights: bool) -> Index:
        """The pipeline's index. From the hub, `weights` fetches its weights too."""
        patterns = ["*.json", *(patterns_of((*DENOISERS, *DECODERS), self.config.variant) if weights else ())]
        return find_index(self.name, self.config, self.config.path, patterns)

    def _denoiser(self, index: Index) -> str:
        return index.component(DENOISERS, ["UNet2DModel", "DiTTransformer2DModel"])

    def _components(self, index: Index) -> list[str]:
        """The names of the network and of the autoencoder, if there is one."""
        decoders = [name for name in DECODERS if name in index.components]
        for name in decoders:
            index.component((name,), list(AUTOENCODERS))
        return [self._denoiser(index), *decoders[:1]]

    def _check(self, index: Index) -> SchedulerReading:
        """How to use the pipeline. Raises UserError unless it fits this source, the dataset and the conditioning."""
        if texts := [name for name in index.components if name.startswith("text_encoder")]:
            raise UserError(
                f"the {index.pipeline} in {index.name!r} takes prompts (it has {texts[0]}), "
                f"teacher={self.name} takes classes"
            )
        reading, _ = read_schedule(index)
        if reading.family not in self.families:
            raise UserError(
                f"the scheduler of the {index.pipeline} in {index.name!r} is of the {reading.family} family, which "
                f"teacher={self.name} does not support. Possible: {', '.join(self.families)}"
            )
        component = self._denoiser(index)
        try:
            serves = NETWORKS[index.components[component]].serves(index.full_config(component))
        except (KeyError, TypeError) as error:
            raise _unusable(index, component, "its config does not have the number of classes") from error
        check_classes(serves, self.conditioning.classes, self.conditioning.guided, index.name)
        if self.config.clip != "auto":
            clip = Clip("" if self.config.clip == "none" else self.config.clip)
            reading = dataclasses.replace(reading, clip=clip, plain={**reading.plain, "clip": clip.plain()})
        _, made = self._shapes(index)
        if made != tuple(self.dataset.shape):
            raise UserError(
                f"the teacher does not fit the dataset: its images are (C,H,W) = {made}, the dataset's are "
                f"{self.dataset.shape}"
            )
        return reading

    def _shapes(self, index: Index) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
        """C,H,W of the network's input, and of the decoded images."""
        try:
            return self._config_shapes(index)
        except (KeyError, TypeError, ValueError, OverflowError, MemoryError) as error:
            raise UserError(
                f"teacher.path: the configs of {index.name!r} do not have the shape of its images"
            ) from error

    def _config_shapes(self, index: Index) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
        component, *decoders = self._components(index)
        config = index.full_config(component)
        size = config["sample_size"] or self.dataset.shape[1:]  # null: that of the dataset
        height, width = (size, size) if isinstance(size, int) else size
        shape = (config["in_channels"], height, width)
        if not decoders:
            return shape, shape
        decoder = decoders[0]
        return shape, AUTOENCODERS[index.components[decoder]].image_shape(index.full_config(decoder), shape)

    def _teacher(self, index: Index, modules: dict[str, Any], sha256: str) -> Teacher:
        reading = self._check(index)
        _, scheduler = read_schedule(index)
        component, *decoders = modules
        network = self._wrapped(index, component, modules[component], reading)
        autoencoder = None
        if decoders:
            autoencoder = AUTOENCODERS[index.components[decoders[0]]](modules[decoders[0]], self.device)
        shape, made = self._shapes(index)
        return Teacher(
            self.name,
            Denoiser(network, reading.schedule, reading.prediction).to(self.device),
            shape,
            sha256,
            {
                "pipeline": index.pipeline,
                "path": index.name,
                "revision": self.config.revision,
                "variant": self.config.variant,
                "reading": reading.plain,
                "scheduler": _plain(scheduler),
            },
            Conditioning(self.conditioning.classes),
            blank=lambda: self._wrapped(index, component, blank_component(index, component), reading),
            decode=autoencoder.decode if autoencoder else None,
            to_latents=autoencoder.encode if autoencoder else None,
            decoded=made if autoencoder else None,
            offloaded=(autoencoder.offloaded,) if autoencoder else (),
            clip=reading.clip,
        )

    @staticmethod
    def _wrapped(index: Index, component: str, module: Any, reading: SchedulerReading) -> DiffusersNetwork:
        return NETWORKS[index.components[component]](module, reading.call)


class Consistency(Diffusers):
    """A released consistency model, a ConsistencyModelPipeline. One DDIM step is its one-step sample."""

    name = "consistency"
    families = ("consistency",)


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    """A config for records, with infinities as text, because JSON has none."""
    finite = lambda value: not isinstance(value, float) or math.isfinite(value)
    return {name: value if finite(value) else str(value) for name, value in config.items()}


@hookimpl(api=2)
def register_teachers(register) -> None:
    register(Diffusers)
    register(Consistency)
