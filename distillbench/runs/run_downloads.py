"""What the settings of a run need to be downloaded: its dataset, its teacher, the weights of its feature networks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from distillbench.diffusion.distances import LPIPS
from distillbench.errors import Unavailable, UserError
from distillbench.evaluation import pretrained_weights
from distillbench.evaluation.features import FeatureNetwork
from distillbench.evaluation.pretrained_weights import WeightsFile, locate, weights_folder
from distillbench.options import plain_settings
from distillbench.registry import Registry
from distillbench.runs.config import RunConfig
from distillbench.runs.distances import Lpips
from distillbench.runs.metric_choice import chosen_metrics
from distillbench.storage.downloads import Offer, fetch, located, offered
from distillbench.storage.source_messages import missing_dataset
from distillbench.storage.sources import Source, in_megabytes, of_dataset, of_teacher, size_in_words
from distillbench.system.progress import Progress
from distillbench.training.method import MethodConfig

Network = type[FeatureNetwork] | type[Lpips]  # what has files of weights


@dataclass(frozen=True)
class Downloads:
    """What is to be downloaded: sources as their servers offer them, and networks that lack files of weights."""

    offers: tuple[Offer, ...] = ()
    networks: tuple[Network, ...] = ()

    @property
    def needed_to_plan(self) -> bool:
        """Whether a plan is made from some of them; from the networks of metrics it is not."""
        return bool(self.offers) or Lpips in self.networks

    @property
    def sizes(self) -> list[int | None]:
        """Bytes of each; None if the server does not say them."""
        return [offer.bytes for offer in self.offers] + [_mib(cls) * 2**20 for cls in self.networks]

    def lines(self) -> list[str]:
        """A line for each: name, size, content, origin, licence."""
        return [line for offer in self.offers for line in _line(offer.source, offer.bytes)] + [
            line for cls in self.networks for line in describe_network(cls)
        ]

    def fetch(self, progress: Progress) -> None:
        """Download all, one after the other."""
        for offer in self.offers:
            progress.say(f"downloaded: {fetch(offer, progress)}")
        for cls in self.networks:
            for path, licence in fetch_network(cls, None, progress):
                progress.say(f"downloaded: {path} ({licence})")


def fetch_network(cls: Network, given: Path | None, progress: Progress) -> Iterator[tuple[Path, str]]:
    """Download the files of weights of a network, or copy them from `given`. Yields each with its licence."""
    for weights in (cls.weights, *cls.also):
        yield pretrained_weights.fetch(cls.name, weights, weights_folder(), given, progress), weights.licence


def lacking(cls: Network) -> list[WeightsFile]:
    """The files of weights of a network that are not there."""
    found = []
    for weights in (cls.weights, *cls.also):
        try:
            locate(cls.name, weights, weights_folder())
        except Unavailable:
            found.append(weights)
    return found


def _mib(cls: Network) -> int:
    """What is to be downloaded for a network."""
    return sum(weights.mib for weights in lacking(cls))


def describe_network(cls: Network) -> list[str]:
    """The line about the download of a network's weights."""
    weights = cls.weights
    return [f"download {cls.name}, {_mib(cls)} MiB: weights, from {weights.url}; licence: {weights.licence}"]


def describe_source(source: Source) -> list[str]:
    """The lines about the download of a source, without asking its server."""
    return _line(source, source.known_bytes)


def _line(source: Source, size: int | None) -> list[str]:
    said = size_in_words(source) if size is None else in_megabytes(size)
    line = f"download {source.name}, {said}: {source.title}, from {source.origin}, by {source.publisher}"
    return [f"{line}; licence: {source.licence}", *([f"  {source.note}"] if source.note else [])]


@dataclass(frozen=True)
class Needs:
    """What a run needs: sources that can be downloaded, networks, and words on what cannot be downloaded."""

    sources: tuple[Source, ...]
    networks: tuple[Network, ...]
    by_hand: tuple[str, ...]


def needs_of(config: RunConfig, registry: Registry) -> Needs:
    """Everything that the run reads from files, whether it is there or not."""
    found = {"dataset": _dataset_source(config), "teacher": _teacher_source(config)}
    by_hand = [words for part, source in found.items() if source is None and (words := _by_hand(config, part))]
    networks = _networks_of(config, registry).values()
    return Needs(tuple(s for s in found.values() if s is not None), tuple(networks), tuple(by_hand))


def _networks_of(config: RunConfig, registry: Registry) -> dict[str, Network]:
    """By name: the networks of the metrics, and LPIPS if a method trains with it."""
    metrics = chosen_metrics(config.evaluation, registry).values()
    networks: dict[str, Network] = {cls.network.name: cls.network for cls in metrics if cls.network is not None}
    if any(value in LPIPS for method in config.methods.values() for value in _texts(method)):
        networks[Lpips.name] = Lpips
    return networks


def _texts(method: MethodConfig) -> list[str]:
    """The settings of a method that are texts, such as the name of a distance."""
    return [value for value in plain_settings(method).values() if isinstance(value, str)]


def _by_hand(config: RunConfig, part: str) -> str:
    """What to say of a dataset or teacher that takes a path, has none, and has no source."""
    settings = plain_settings(getattr(config, part))
    is_required = part == "dataset" or "download" in settings  # a trained teacher needs no path
    if "path" not in settings or settings["path"] or not is_required:
        return ""
    return f"{part}={settings['kind']} has no known download for these settings: give {part}.path"


def _dataset_source(config: RunConfig) -> Source | None:
    settings = plain_settings(config.dataset)
    return None if settings.get("path") else of_dataset(settings["kind"], settings)


def _teacher_source(config: RunConfig) -> Source | None:
    teacher, dataset = plain_settings(config.teacher), plain_settings(config.dataset)
    if teacher.get("path"):
        return None
    return of_teacher(
        dataset["kind"], dataset.get("resolution", 0), config.conditional, teacher["kind"], teacher.get("release", "")
    )


def check_dataset_files(configs: Sequence[RunConfig], command: str) -> None:
    """Raise UserError, with the line to write, if a dataset's files are neither there nor asked for."""
    for config in _distinct(configs):
        source, teacher = _dataset_source(config), _teacher_source(config)
        if source is None or located(source) is not None or plain_settings(config.dataset).get("download"):
            continue
        has_teacher = teacher is None or located(teacher) is not None
        raise UserError(missing_dataset(source, command, None if has_teacher else teacher))


def _distinct(configs: Sequence[RunConfig]) -> list[RunConfig]:
    """One of all settings with the same dataset and teacher, which in a large grid are the same objects."""
    return list({(id(c.dataset), id(c.teacher), c.conditional): c for c in configs}.values())


def asked(configs: Sequence[RunConfig], registry: Registry) -> Downloads:
    """What the settings ask for (``download=true``) and that is not there yet, with sizes.

    dataset.download and teacher.download are for sources, evaluation.download for weights of feature networks and of
    LPIPS.
    """
    sources: dict[str, Source] = {}
    for config in _distinct(configs):
        for part, source in ((config.dataset, _dataset_source(config)), (config.teacher, _teacher_source(config))):
            if source is not None and plain_settings(part).get("download") and located(source) is None:
                sources[source.name] = source
    networks: dict[str, Network] = {}
    for config in configs:
        if config.evaluation.download:
            networks |= _networks_of(config, registry)
    missing = tuple(cls for cls in networks.values() if cls.weights.url and lacking(cls))
    return Downloads(tuple(offered(source) for source in sources.values()), missing)


def fetch_asked(configs: Sequence[RunConfig], registry: Registry, progress: Progress) -> None:
    """Download what the settings ask for by ``download=true``. What each download is, and its size, is said first."""
    downloads = asked(configs, registry)
    for line in downloads.lines():
        progress.say(line)
    downloads.fetch(progress)
