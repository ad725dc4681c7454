"""The commands about data that runs need: ``data check``, ``fetch`` and ``reference`` (statistics)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from distillbench.cli.command_options import UserPath, output_file, with_plugins
from distillbench.cli.terminal import new_console, print_definitions
from distillbench.errors import Unavailable, UserError, unknown

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from distillbench.evaluation.features import FeatureNetwork
    from distillbench.evaluation.reference_statistics import RealImages
    from distillbench.registry import Registry


@click.group()
def data() -> None:
    """Inspect datasets."""


@data.command("check")
@click.argument("settings", nargs=-1)
@click.option("--grid", type=UserPath(dir_okay=False), help="Write a picture of the first 64 images (.png).")
@with_plugins
def check_data(registry: Registry, settings: tuple[str, ...], grid: str | None) -> None:
    """Read every image of a dataset and print counts, classes, the hash, damaged and duplicate images.

    The exit code is 1 if images are damaged.

    \b
    distillbench data check dataset=ffhq dataset.path=ffhq-64x64.zip --grid ffhq.png
    """
    from pathlib import Path

    from distillbench.cli.data_check import command

    raise SystemExit(command(settings, registry, None if grid is None else Path(grid), new_console()))


@click.command()
@click.argument("names", metavar="[NAME...]", nargs=-1)
@click.option("--from", "source", type=UserPath(), help="Copy this file, or the files of this folder.")
@click.option("--yes", "-y", is_flag=True, help="Do not ask before a download.")
@with_plugins
def fetch(registry: Registry, names: tuple[str, ...], source: str | None, yes: bool) -> None:
    """Download datasets, teachers, and weights of feature networks and of LPIPS.

    NAME is a dataset (ffhq), a released teacher (edm-ffhq-64), a feature network (inception, which FID needs), lpips (a
    distance that methods may train with), or a setting of a run: experiment=NAME fetches everything that this
    experiment reads. Without NAME all are listed.

    Sizes and licences are shown before the download, and you are asked, except for weights of networks. Files are
    checked by their SHA-256. Where none is published, the first download is trusted and later ones are compared with
    it. Datasets and teachers are stored in $DISTILLBENCH_DOWNLOADS, weights in $DISTILLBENCH_WEIGHTS, or in the user's
    cache. An interrupted download continues where it ended.

    \b
    distillbench fetch experiment=boot_ffhq64
    distillbench fetch ffhq edm-ffhq-64 --yes
    distillbench fetch inception --from weights-inception-2015-12-05-6726825d.pth
    """
    from pathlib import Path

    from distillbench.cli.fetch_command import fetch_named, list_everything

    if names:
        fetch_named(registry, names, None if source is None else Path(source), yes)
    else:
        list_everything(registry)


@click.group()
def reference() -> None:
    """Export or import statistics of real images (.npz)."""


@reference.command("export")
@click.argument("settings", nargs=-1)
@click.option("--network", required=True, help="Feature network, such as inception.")
@click.option("--output", "-o", required=True, type=UserPath(dir_okay=False), help="File to write (.npz).")
@with_plugins
def export_reference(registry: Registry, settings: tuple[str, ...], network: str, output: str) -> None:
    """Compute the statistics of a dataset and write them in the format of pytorch-fid and EDM, with provenance.

    \b
    distillbench reference export dataset=digits --network efficientnet_lite0 -o digits.npz
    distillbench run 'methods=[boot]' dataset=digits 'evaluation.references=[digits.npz]'
    """
    from distillbench.evaluation.reference_statistics import provenance_of, write_reference

    cls, file = _network(registry, network), output_file(output, ".npz")
    real = _real_images(registry, settings)
    write_reference(file, real.statistics(cls), provenance_of(real.dataset, cls.identity(real.networks.folder)))
    click.echo(f"written: {file}, {network} statistics of {real.count} images of {real.dataset.name}")


@reference.command("import")
@click.argument("file", type=UserPath(dir_okay=False))
@click.argument("settings", nargs=-1)
@click.option("--network", required=True, help="The network and preprocessing that FILE was computed with.")
@click.option("--images", required=True, type=click.IntRange(min=2), help="Number of images behind FILE.")
@click.option("--output", "-o", required=True, type=UserPath(dir_okay=False), help="File to write (.npz).")
@with_plugins
def import_reference(
    registry: Registry, file: str, settings: tuple[str, ...], network: str, images: int, output: str
) -> None:
    """Import statistics of another tool (pytorch-fid, EDM, guided-diffusion) with the provenance that you declare.

    distillbench cannot verify which dataset and network FILE was computed with. Images in FILE (`arr_0`) are passed
    through the network: precision and recall are then computed with them.

    \b
    distillbench reference import cifar10-32x32.npz dataset=cifar10 dataset.path=cifar-10-python.tar.gz \\
      --network inception --images 50000 -o cifar10.npz
    """
    from pathlib import Path

    from distillbench.evaluation.reference_statistics import declared, provenance_of, read_reference, write_reference

    cls, written = _network(registry, network), output_file(output, ".npz")
    real = _real_images(registry, settings)
    wanted = provenance_of(real.dataset, cls.identity(real.networks.folder))
    statistics, provenance = declared(read_reference(Path(file)), wanted, cls.width, images)
    features, words = _features_in(Path(file), real, cls)
    write_reference(written, statistics, provenance, features)
    click.echo(f"written: {written}, declared as {network} statistics of {images} images of {real.dataset.name}{words}")


@reference.command("show")
@click.argument("file", type=UserPath(dir_okay=False))
def show_reference(file: str) -> None:
    """Show the size, hash and provenance of a reference file."""
    from pathlib import Path

    from distillbench.evaluation.reference_statistics import read_reference

    found = read_reference(Path(file))
    click.echo(f"{found.path.name}: {len(found.statistics.mean)} features, sha256 {found.sha256}")
    print_definitions((name, str(value)) for name, value in sorted(found.provenance.items()))
    if found.features is not None:
        click.echo(f"with features of {len(found.features)} single images, for precision and recall")
    if not found.provenance:
        click.echo("it has no provenance: see distillbench reference import --help")


def _features_in(file: Path, real: RealImages, network: type[FeatureNetwork]) -> tuple[Tensor | None, str]:
    """The features of the images in a reference file, if it has any and the network is there; and what to say of it."""
    from distillbench.evaluation.features import ImageSet
    from distillbench.evaluation.sample_files import read_samples
    from distillbench.storage.npz import Npz

    names = Npz(file).names
    unread = [name for name in names if name not in ("mu", "sigma", "arr_0", "arr_1")]
    left_out = f"; not imported: {', '.join(unread)}" if unread else ""
    if "arr_0" not in names:
        return None, left_out
    images = read_samples(file, (real.shape[1], real.shape[2]))
    try:
        features = ImageSet(images.batches, images.count, images.shape, real.networks).features(network)
    except Unavailable as reason:
        return None, f", without features of its {images.count} images: {reason}{left_out}"
    return features, f", with features of its {images.count} images{left_out}"


def _network(registry: Registry, name: str) -> type[FeatureNetwork]:
    from distillbench.cli.fetch_command import networks_of

    networks = networks_of(registry)
    if name not in networks:
        raise unknown("feature network", name, networks)
    return networks[name]


def _real_images(registry: Registry, settings: Sequence[str]) -> RealImages:
    """The real images of the dataset in `settings`."""

    from distillbench.evaluation.features import Networks
    from distillbench.evaluation.pretrained_weights import weights_folder
    from distillbench.evaluation.reference_statistics import RealImages
    from distillbench.records.layout import ResultsFolder
    from distillbench.runs.config import compose_runs
    from distillbench.runs.run_downloads import fetch_asked
    from distillbench.runs.shared_context import choose_device
    from distillbench.system.progress import Progress

    configs = compose_runs(list(settings), registry, need_methods=False)
    if len(configs) > 1:
        raise UserError(f"a reference describes one dataset, the settings describe {len(configs)}")
    config = configs[0]
    fetch_asked(configs, registry, Progress(new_console()))
    dataset = registry.get("datasets", config.dataset.kind).cls(config.dataset)
    networks = Networks(weights_folder(), choose_device(config.device))
    return RealImages(dataset, networks, ResultsFolder.of(config.results_dir).cache("references"))
