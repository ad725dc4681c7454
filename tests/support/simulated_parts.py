"""Parts of the harness on a simulated GPU and on the CPU: run by test_simulated_cuda_parts.py."""

from __future__ import annotations

import functools
import gc
import io
import math
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distillbench.simulated_cuda import install, recording

install(2)
torch.set_num_threads(1)

from rich.console import Console  # noqa: E402

from distillbench.datasets.augmentation import AugmentConfig  # noqa: E402
from distillbench.diffusion.conditioning import Conditioning  # noqa: E402
from distillbench.diffusion.denoiser import Denoiser, NetworkCall  # noqa: E402
from distillbench.diffusion.samplers import Solver  # noqa: E402
from distillbench.diffusion.schedules import VPCosine  # noqa: E402
from distillbench.evaluation import feature_metrics as features_scores  # noqa: E402
from distillbench.evaluation.evaluator import Evaluator, features_kept, teacher_sampler  # noqa: E402
from distillbench.evaluation.features import FeatureNetwork, Networks  # noqa: E402
from distillbench.evaluation.pretrained_weights import WeightsFile  # noqa: E402
from distillbench.evaluation.reference_statistics import RealImages, read_reference  # noqa: E402
from distillbench.evaluation.sampling_speed import Measurement, Subject, measure_subject  # noqa: E402
from distillbench.evaluation.settings import EvaluationConfig  # noqa: E402
from distillbench.evaluation.timing import timer_of  # noqa: E402
from distillbench.networks.architectures import DiT, ResidualMLP, UNet  # noqa: E402
from distillbench.networks.cuda_graphs import Captured  # noqa: E402
from distillbench.networks.edm import DhariwalUNet, SongUNet  # noqa: E402
from distillbench.system.progress import Progress  # noqa: E402
from distillbench.teachers.encoded_prompts import EncodedPrompts  # noqa: E402
from distillbench.teachers.latents import training_data  # noqa: E402
from distillbench.teachers.teacher import Teacher  # noqa: E402
from distillbench.training import data_stream  # noqa: E402
from distillbench.training.data_stream import DataStream  # noqa: E402
from distillbench.training.method import Batch  # noqa: E402
from random_pictures import Pictures  # noqa: E402
from simulated import check, main  # noqa: E402

GPU, DEVICES = "cuda:0", ("cpu", "cuda:0")
SILENT = Progress(Console(file=io.StringIO()))
SHAPE, CLASSES = (3, 4, 4), 3


class Toy(FeatureNetwork):
    """Six linear features."""

    name, protocol, width, batch = "toy", "toy/1", 6, 16
    weights = WeightsFile("toy", "ab", "", "none", 0)

    @classmethod
    def locate(cls, folder: Path) -> Path:
        return folder

    def __init__(self, file: Path, device: str) -> None:
        generator = torch.Generator().manual_seed(0)
        self.matrix = torch.randn(math.prod(SHAPE), 6, generator=generator).to(device)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return images.float().flatten(1) @ self.matrix


SETTINGS = {"KernelDistance": {"subset": 20, "subsets": 5}}
METRICS = {
    (n := base.__name__): type(n, (base,), {"name": n, "network": Toy} | SETTINGS.get(n, {}))
    for base in vars(features_scores).values()
    if isinstance(base, type) and issubclass(base, features_scores.FeatureMetric)
    and base is not features_scores.FeatureMetric
}  # fmt: skip


def teacher_on(device: str, conditioning: Conditioning, decode: Callable | None = None) -> Teacher:
    torch.manual_seed(0)
    network = ResidualMLP(SHAPE, 16, 1, conditioning.classes)
    for weight in network.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    denoiser = Denoiser(network, VPCosine(), "v").to(device)
    return Teacher("toy", denoiser, SHAPE, "1" * 64, conditioning=conditioning, decode=decode)


@check
def scores() -> dict[str, Any]:
    """All feature metrics of a teacher's samples, for references that are computed, cached and imported."""
    found: dict[str, Any] = {}
    config = EvaluationConfig(images=96, batch_size=32, teacher_steps=[1, 4])
    conditioning = Conditioning(CLASSES, 2.0)
    for device in DEVICES:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            for way in ("computed", "cached", "imported"):
                files = [read_reference(path) for path in folder.glob("toy-*.npz")] if way == "imported" else []
                kept = features_kept(METRICS)
                real = RealImages(Pictures(40, SHAPE, CLASSES), Networks(folder, device), folder, files, kept)
                teacher = teacher_on(device, conditioning)
                evaluator = Evaluator(config, METRICS, real, teacher, SILENT, folder)
                sampler = teacher_sampler(teacher, Solver.parse("ddim"))
                measured = evaluator.measure(sampler, 2, 0, True, "teacher")
                found[f"{device}/{way}"] = [measured.scores, measured.missing]
    return found


@check
def sampled() -> dict[str, Any]:
    """Waits while sampling four batches with a decoder, and whether images equal the CPU's; also with CUDA graphs."""
    found: dict[str, Any] = {}
    images = {}
    for way, device, graphs in (("cpu", "cpu", False), ("plain", GPU, False), ("graphs", GPU, True)):
        decode = lambda z: torch.nn.functional.interpolate(z, scale_factor=1.0)
        config = EvaluationConfig(images=128, batch_size=32, teacher_steps=[2], cuda_graphs=graphs)
        with tempfile.TemporaryDirectory() as name:
            real = RealImages(Pictures(40, SHAPE, CLASSES), Networks(Path(name), device), Path(name))
            evaluator = Evaluator(config, {}, real, teacher_on(device, Conditioning(CLASSES, 2.0), decode), SILENT)
            evaluator.teacher_samples(1)
            with recording() as record:
                images[way] = evaluator.teacher_samples(0)[0].tensor
            found[way] = [wait.what for wait in record.waits]
    found["equal"] = [torch.equal(images["cpu"], images[way]) for way in ("plain", "graphs")]
    return found


def _networks() -> dict[str, tuple[tuple[int, int, int], Callable[[], torch.nn.Module]]]:
    small = (3, 8, 8)
    song: dict[str, Any] = {"model_channels": 16, "channel_mult": (1, 2), "num_blocks": 1, "attn_resolutions": (4,)}
    return {
        "mlp": (SHAPE, lambda: ResidualMLP(SHAPE, 16, 1)),
        "unet": (small, lambda: UNet(small, 8, 1)),
        "dit": (small, lambda: DiT(small, 16, 1)),
        "song": (small, lambda: SongUNet(8, 3, 3, **song)),
        "dhariwal": (small, lambda: DhariwalUNet(8, 3, 3, **song)),
    }


@check
def networks() -> dict[str, Any]:
    """Per network: waits of a call, and whether replays equal plain calls after weights and inputs have changed."""
    found = {}
    for name, (shape, make) in _networks().items():
        torch.manual_seed(0)
        denoiser = Denoiser(make(), VPCosine(), "v").to(GPU).eval()
        for weight in denoiser.parameters():
            weight.data = torch.randn_like(weight) / 10
        captured, plain, same = Captured(NetworkCall(), GPU), NetworkCall(), []
        with torch.no_grad():
            for size in (2, 2, 3):
                x = torch.randn(size, *shape, device=GPU)
                t = torch.rand(size, 1, 1, 1, device=GPU, dtype=torch.float64)
                with denoiser.counted.counter.calling(captured):
                    replayed = denoiser(x, t)
                with denoiser.counted.counter.calling(plain), recording() as record:
                    same.append(torch.equal(replayed, denoiser(x, t)))
                for weight in denoiser.parameters():
                    weight.mul_(1.1)
        found[name] = [same, [wait.what for wait in record.waits if wait.what != "equal"]]
    return found


@check
def graphs_one_after_the_other() -> list[bool]:
    """Captures of networks, each freed before the next one, while another thread pins memory."""
    (shape, make), *_ = _networks().values()
    captured, same = Captured(NetworkCall(), GPU), []
    with torch.no_grad(), ThreadPoolExecutor(1) as thread:

        def pin(*_: Any) -> None:
            thread.submit(torch.ones(1).pin_memory).result()

        x, t = torch.randn(2, *shape, device=GPU), torch.rand(2, 1, 1, 1, device=GPU, dtype=torch.float64)
        for _ in range(3):
            denoiser = Denoiser(make(), VPCosine(), "v").to(GPU).eval()
            denoiser.network.register_forward_pre_hook(pin)
            with denoiser.counted.counter.calling(captured):
                replayed = denoiser(x, t)
            same.append(torch.equal(replayed, denoiser(x, t)))
            del denoiser
            gc.collect()
    return same


@check
def conditions() -> dict[str, Any]:
    """Conditions equal the CPU's, are on the device and do not wait; texts too."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "prompts.npy"
        np.save(file, np.arange(24, dtype=np.float32).reshape(CLASSES + 1, 2, 3))
        texts = EncodedPrompts(file, 1.0)
        for name, conditioning in {
            "classes": Conditioning(CLASSES),
            "guided": Conditioning(CLASSES, 2.0),
            "drawn": Conditioning(CLASSES, 2.0, (1.0, 3.0)),
            "texts": Conditioning(CLASSES, 2.0, texts=texts),
        }.items():
            made = {}
            for device in DEVICES:
                generator = torch.Generator(device).manual_seed(0)
                conditioning.none(conditioning.draw(4, generator, device, None))  # fills caches
                with recording() as record:
                    drawn = conditioning.draw(4, generator, device, None)
                    empty = conditioning.none(drawn) if conditioning.guided else drawn
                made[device] = [
                    drawn, empty, conditioning.of_images(range(5), device), conditioning.of_pairs(1, range(5), device)
                ]  # fmt: skip
            parts = [
                (getattr(a, part), getattr(b, part))
                for a, b in zip(made["cpu"], made[GPU], strict=True)
                for part in ("labels", "w", "text")
                if getattr(a, part) is not None
            ]
            on = {str(b.device) for _, b in parts}
            found[name] = [all(torch.equal(a, b.cpu()) for a, b in parts), sorted(on), [w.what for w in record.waits]]
    return found


@check
def latents() -> dict[str, Any]:
    """Latents of the dataset's images, encoded on each device."""
    encoded = []
    for device in DEVICES:
        with tempfile.TemporaryDirectory() as folder:
            matrix = torch.ones(1, 1, 2, 2, device=device).expand(3, 1, 2, 2) / 4
            to_latents = functools.partial(torch.nn.functional.conv2d, weight=matrix, stride=2, groups=3)
            denoiser = Denoiser(ResidualMLP((3, 2, 2), 8, 1), VPCosine(), "v").to(device)
            teacher = Teacher("toy", denoiser, (3, 2, 2), "1" * 64, to_latents=to_latents, decode=None)
            made = training_data(Pictures(40, SHAPE, CLASSES), teacher, Path(folder), device, SILENT)
            encoded.append(made.read(torch.arange(40)))
    return {"equal": torch.equal(*encoded), "device": str(encoded[1].device)}


@check
def stream() -> dict[str, Any]:
    """Batches of each device, flipped and transformed, from device memory and prefetched, and waits for one batch."""
    found: dict[str, Any] = {}
    before = data_stream.HELD_BYTES
    for way, held in (("held", before), ("read ahead", 0)):
        data_stream.HELD_BYTES = held
        batches: dict[str, list[torch.Tensor]] = {}
        for device in DEVICES:
            source = DataStream(Pictures(40, SHAPE, CLASSES), 0, device, 0 if device == "cpu" else 2, flip=True)
            dice = torch.Generator(device).manual_seed(0)
            batches[device] = [part.cpu() for _ in range(2) for part in source.read(8)]
            with recording() as record:
                x_0 = Batch(8, SHAPE, dice, device, source.read, augment=AugmentConfig(probability=0.5)).x_0
            state = source.get_state()
            batches[device].append(x_0.cpu())
            source.set_state(state)
            batches[device].append(source.read(8)[0].cpu())
            source.close()
        equal = all(torch.equal(a, b) for a, b in zip(*batches.values(), strict=True))
        found[way] = [equal, str(x_0.device), [wait.what for wait in record.waits]]
    data_stream.HELD_BYTES = before
    return found


@check
def timing() -> dict[str, Any]:
    """All columns of the cost of sampling."""
    teacher = teacher_on(GPU, Conditioning(CLASSES, 2.0))
    measurement = Measurement((2,), GPU, 4, 2, 0.01)
    subject = Subject(teacher_sampler(teacher, Solver.parse("ddim")), teacher)
    (speed,) = measure_subject(subject, measurement, timer_of(GPU))
    names = ("latency_p50_ms", "images_per_second", "peak_gpu_mib", "peak_gpu_reserved_mib", "gflops")
    return {"values": {name: getattr(speed, name) for name in names}}


main()
