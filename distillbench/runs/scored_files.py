"""``distillbench samples score``: the scores of a file of samples, whoever made them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from distillbench.datasets.dataset import to_float
from distillbench.errors import Unavailable, UserError, quoted
from distillbench.evaluation.evaluator import ROW, features_kept, score_or_reason
from distillbench.evaluation.features import FeatureNetwork, ImageSet, Networks
from distillbench.evaluation.metric import Need, Samples
from distillbench.evaluation.pretrained_weights import weights_folder
from distillbench.evaluation.reference_statistics import RealImages
from distillbench.evaluation.sample_files import SampleFile, check_exists, read_samples
from distillbench.evaluation.stored_images import StoredImages
from distillbench.records.layout import ResultsFolder
from distillbench.registry import Registry
from distillbench.runs.config import compose_runs
from distillbench.runs.metric_choice import check_real_features, chosen_metrics, described, read_references
from distillbench.runs.run_downloads import fetch_asked
from distillbench.runs.shared_context import choose_device
from distillbench.storage.files import check_room
from distillbench.system.progress import Progress

USED = (  # settings that scores of a file depend on
    *("dataset", "experiment", "evaluation.metrics", "evaluation.references", "evaluation.real_features"),
    *("evaluation.download", "device", "threads", "results_dir"),
)
USED_GROUPS = ("dataset.",)
NO_TEACHER = "a file of samples comes without those of a teacher"


@dataclass(frozen=True)
class FileScores:
    """The scores of a file; None if undefined, for the reason in `missing`."""

    images: int
    scores: dict[str, float | None]
    missing: dict[str, str]
    columns: dict[str, dict[str, str]]  # by metric: its declarations


class NoImages(ImageSet):
    """Stands for the teacher's samples, which are not there."""

    def _extract(self, network: type[FeatureNetwork], keep: bool) -> None:
        raise Unavailable(NO_TEACHER)


def score_file(path: Path, settings: Sequence[str], registry: Registry, progress: Progress) -> FileScores:
    """Score the images at `path` by the dataset and the `evaluation` of `settings`. Raises UserError for bad input."""
    check_exists(path)  # before a dataset is downloaded
    _check_used(settings)
    configs = compose_runs(list(settings), registry, need_methods=False)
    if len(configs) > 1:
        raise UserError(f"a file is scored by one group of settings, got {len(configs)}")
    config = configs[0]
    torch.set_num_threads(config.threads)
    weights, device = weights_folder(), choose_device(config.device)
    metrics = chosen_metrics(config.evaluation, registry)
    fetch_asked(configs, registry, progress)
    dataset = registry.get("datasets", config.dataset.kind).cls(config.dataset)
    references = read_references(config.evaluation, metrics, dataset, weights)
    check_real_features(config.evaluation, metrics, dataset, references)
    file = read_samples(path, (dataset.shape[1], dataset.shape[2]))
    results, networks, kept = ResultsFolder.of(config.results_dir), Networks(weights, device), features_kept(metrics)
    drawn = config.evaluation.real_features
    real = RealImages(dataset, networks, results.cache("references"), references, kept, drawn)
    x_0 = _stored(file, results.cache("answers"))
    try:
        absent = NoImages(lambda: (), 0, file.shape, networks)
        nothing = x_0.tensor[:0]
        images = ImageSet(file.batches, file.count, file.shape, networks, kept)
        pairs = lambda: ((batch, nothing) for batch in x_0.batches())
        samples = Samples(x_0.tensor, nothing, images, absent, real, False, file.labels, None, pairs)
        scores: dict[str, float | None] = {}
        missing: dict[str, str] = {}
        with progress.step(f"scoring {file.count:,} images of {path.name}") as step:
            for index, (name, cls) in enumerate(metrics.items()):
                paired = Need.same_noise in cls.needs
                scores[name], reason = (None, NO_TEACHER) if paired else score_or_reason(cls(), samples)
                if reason:
                    missing[name] = reason
                step.advance((index + 1) / len(metrics), name)
    finally:
        x_0.close()
    return FileScores(file.count, scores, missing, described(metrics, config.evaluation, dataset, references))


def _check_used(settings: Sequence[str]) -> None:
    """Raise UserError for a setting that does not decide the scores of a file."""
    for word in settings:
        name = word.partition("=")[0]
        if "=" in word and name not in USED and not name.startswith(USED_GROUPS):
            why = "nothing is trained or sampled, and all images of the file are scored"
            possible = ", ".join([*USED, *(f"{group}*" for group in USED_GROUPS)])
            raise UserError(f"samples score makes no use of {quoted(word)}: {why}. Possible: {possible}")


def _stored(file: SampleFile, folder: Path) -> StoredImages:
    """The images in [-1, 1], as metrics of pixels read them."""
    channels, height, width = file.shape
    check_room(folder, 4 * file.count * channels * height * width, ROW)
    stored = StoredImages(folder)
    for batch in file.batches():
        stored.add(to_float(batch))
    return stored
