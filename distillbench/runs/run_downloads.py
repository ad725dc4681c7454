"""What the settings of a run need to be downloaded: its dataset, its teacher, the weights of its feature networks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from distillbench.diffusion.distances import LPIPS
from distillbench.errors import UserError
from distillbench.evaluation.features import FeatureNetwork
from distillbench.registry import Registry
from distillbench.runs.config import RunConfig
from distillbench.runs.distances import Lpips
from distillbench.runs.metric_choice import chosen_metrics
from distillbench.runs.shared_context import plain_settings
from distillbench.storage.downloads import Offer, fetch, located, offered
from distillbench.storage.source_messages import missing_dataset
from distillbench.storage.sources import Source, in_megabytes, of_dataset, of_teacher
from distillbench.system.progress import Progress
from distillbench.training.method import MethodConfig


@dataclass(frozen=True)
class Needs:
    """What a run needs: sources that can be downloaded, networks, and words on what cannot be downloaded."""

    sources: tuple[Source, ...]
    networks: tuple[type[FeatureNetwork] | type[Lpips], ...]
    by_hand: tuple[str, ...]


def needs_of(config: RunConfig, registry: Registry) -> Needs:
    """Everything that the run reads from files, whether it is there or not."""
    found = {"dataset": _dataset_source(config), "teacher": _teacher_source(config)}
    by_hand = [words for part, source in found.items() if source is None and (words := _by_hand(config, part))]
    metrics = chosen_metrics(config.evaluation, registry).values()
    networks: dict[str, type[FeatureNetwork] | type[Lpips]] = {}
    networks |= {cls.network.name: cls.network for cls in metrics if cls.network is not None}
    if any(value in LPIPS for method in config.methods.values() for value in _texts(method)):
        networks[Lpips.name] = Lpips
    return Needs(tuple(s for s in found.values() if s is not None), tuple(networks.values()), tuple(by_hand))


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


def asked_offers(configs: Sequence[RunConfig]) -> list[Offer]:
    """The downloads that the settings ask for (``download=true``) and that are not there yet, with their sizes."""
    asked: dict[str, Source] = {}
    for config in _distinct(configs):
        for part, source in ((config.dataset, _dataset_source(config)), (config.teacher, _teacher_source(config))):
            if source is not None and plain_settings(part).get("download") and located(source) is None:
                asked[source.name] = source
    return [offered(source) for source in asked.values()]


def fetch_asked(configs: Sequence[RunConfig], progress: Progress) -> None:
    """Download what the settings ask for by ``download=true``. What each download is, and its size, is said first."""
    offers = asked_offers(configs)
    for line in describe(offers):
        progress.say(line)
    fetch_all(offers, progress)


def fetch_all(offers: Sequence[Offer], progress: Progress) -> None:
    """Download the offers one after the other."""
    for offer in offers:
        progress.say(f"downloaded: {fetch(offer, progress)}")


def describe(offers: Sequence[Offer]) -> list[str]:
    """A line for each offer: name, size, content, origin, licence."""
    lines = []
    for offer in offers:
        source = offer.source
        size = "of unknown size" if offer.bytes is None else in_megabytes(offer.bytes)
        lines.append(
            f"download {source.name}, {size}: {source.title}, from {source.origin}, by {source.publisher}; licence: "
            f"{source.licence}"
        )
        lines += [f"  {source.note}"] if source.note else []
    return lines
