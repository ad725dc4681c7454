"""Published image datasets: their content, licences, and where to get their files.

Nothing is downloaded without ``dataset.download=true``. Numbers of images are the published ones. Files of your own
with another number are accepted, and the split in every row shows it ("train (200 of 70,000)"); a download is not.
"""

from __future__ import annotations

from dataclasses import dataclass

from distillbench import hookimpl, option
from distillbench.datasets.image_dataset import FileConfig, FileDataset
from distillbench.storage.sources import FILE, read_sources

RELEASED = read_sources(FILE)  # with how to make the files by hand
NO_LABELS = "none, because EDM's tool writes folder numbers as classes; auto, folders or captions"
EDM_TOOL = "with NVlabs/edm: python dataset_tool.py"


class Cifar10(FileDataset):
    """CIFAR-10: 32x32 colour photographs of 10 classes, 50,000 train and 10,000 test (Krizhevsky 2009)."""

    name = "cifar10"
    licence = "none stated; for research, cite Krizhevsky 2009"
    title = "CIFAR-10, 50,000 + 10,000 photographs of 10 classes, 32x32"
    origin = RELEASED["cifar10"].by_hand
    usual = "cifar-10-python.tar.gz"
    count = {"train": 50_000, "test": 10_000, "all": 60_000}
    known_classes = 10
    known_names = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

    @dataclass
    class Config(FileConfig):
        split: str = option("train", "train, test or all")
        resolution: int = option(32, "side in pixels, as the files have it")
        crop: str = option("none", "center or none")
        resize: str = option("none", "none: the files have the side already; others as of dataset=folder")


class Ffhq(FileDataset):
    """Flickr-Faces-HQ: 70,000 faces, published at 1024x1024, in use at 64x64 (EDM's zip) and 256x256."""

    name = "ffhq"
    licence = "CC BY-NC-SA 4.0 (NVIDIA); each photograph under the licence of its author"
    title = "FFHQ, 70,000 faces, 64x64 unless dataset.resolution=256"
    origin = RELEASED["ffhq"].by_hand
    usual = "ffhq-64x64.zip"
    count = {"train": 70_000}

    @dataclass
    class Config(FileConfig):
        split: str = option("train", "train: all 70,000, as diffusion models are trained and scored on them")
        resolution: int = option(64, "side in pixels: 64 or 256 in the literature")
        resize: str = option("pillow_lanczos", "for images of another size; EDM's tool uses Lanczos")
        labels: str = option("none", NO_LABELS)


class ImageNet64(FileDataset):
    """ImageNet (ILSVRC 2012) at 64x64: 1,281,167 photographs of 1,000 classes, and 50,000 for validation."""

    name = "imagenet64"
    licence = "ImageNet terms: research and education, not commercial"
    title = "ImageNet at 64x64, 1,281,167 + 50,000 photographs of 1,000 classes"
    origin = RELEASED["imagenet64"].by_hand
    usual = "imagenet-64x64.zip"
    count = {"train": 1_281_167, "test": 50_000}
    known_classes = 1000

    @dataclass
    class Config(FileConfig):
        split: str = option("train", "train, or test: the 50,000 for validation")
        resolution: int = option(64, "side in pixels")
        resize: str = option(
            "pillow_lanczos", "for images of another size: as in EDM's zip; adm: as Dhariwal and Nichol"
        )


class LsunBedroom(FileDataset):
    """LSUN Bedroom: 3,033,042 photographs of bedrooms, 256x256."""

    name = "lsun_bedroom"
    licence = "none stated; for research, cite Yu et al. 2015"
    title = "LSUN Bedroom, 3,033,042 photographs, 256x256"
    origin = "fyu/lsun has bedroom_train_lmdb.zip; export its images to a folder, or pack them into a zip of images"
    usual = "lsun-bedroom-256x256.zip"
    count = {"train": 3_033_042}

    @dataclass
    class Config(FileConfig):
        split: str = option("train", "train")
        resolution: int = option(256, "side in pixels")
        resize: str = option("adm", "for images of another size, as Dhariwal and Nichol")
        labels: str = option("none", NO_LABELS)


class CelebaHq(FileDataset):
    """CelebA-HQ: 30,000 faces, published at 1024x1024, in use at 256x256.

    The dataset has no official split. Some publications train on 27,000 and hold out 3,000 images: split=train and
    split=test read folders of these names.
    """

    name = "celebahq"
    licence = "CC BY-NC 4.0 (NVIDIA); CelebA: research, not commercial"
    title = "CelebA-HQ, 30,000 faces, 256x256"
    origin = "tkarras/progressive_growing_of_gans explains how to create it; give a folder or zip of the images"
    usual = "celebahq-256x256.zip"
    count = {"all": 30_000, "train": 27_000, "test": 3_000}

    @dataclass
    class Config(FileConfig):
        split: str = option("all", "all: 30,000; train (27,000) or test (3,000) by convention")
        resolution: int = option(256, "side in pixels")
        resize: str = option("pillow_lanczos", "for images of another size")
        labels: str = option("none", NO_LABELS)


class AfhqV2(FileDataset):
    """AFHQv2: 15,803 faces of cats, dogs and wild animals, published at 512x512, in use at 64x64 (EDM's zip)."""

    name = "afhqv2"
    licence = "CC BY-NC 4.0 (NAVER)"
    title = "AFHQv2, 15,803 faces of animals, 64x64"
    origin = (
        "clovaai/stargan-v2 has afhq_v2.zip, which may be given with dataset.labels=folders. Create EDM's file once "
        f"{EDM_TOOL} --source=afhq_v2 --dest=afhqv2-64x64.zip --resolution=64x64"
    )
    usual = "afhqv2-64x64.zip"
    count = {"all": 15_803, "train": 14_336, "test": 1_467}

    @dataclass
    class Config(FileConfig):
        split: str = option("all", "all, as EDM trains on it; train or test where the source has these folders")
        resolution: int = option(64, "side in pixels")
        resize: str = option("pillow_lanczos", "for images of another size; EDM's tool uses Lanczos")
        labels: str = option("none", NO_LABELS)


class Mnist(FileDataset):
    """MNIST: 28x28 grey handwritten digits, 60,000 train and 10,000 test."""

    name = "mnist"
    licence = "CC BY-SA 3.0 (LeCun, Cortes)"
    title = "MNIST, 60,000 + 10,000 handwritten digits, 28x28"
    origin = "Give the folder of its idx files (train-images-idx3-ubyte.gz, ...), gzipped or not"
    usual = "MNIST"
    count = {"train": 60_000, "test": 10_000, "all": 70_000}
    known_classes = 10
    known_names = tuple("0123456789")
    channels = 1

    @dataclass
    class Config(FileConfig):
        split: str = option("train", "train, test or all")
        resolution: int = option(28, "side in pixels, as the files have it")
        crop: str = option("none", "center or none")
        resize: str = option("none", "none: the files have the side already; others as of dataset=folder")


class FashionMnist(Mnist):
    """Fashion-MNIST: 28x28 grey pictures of clothes, 60,000 train and 10,000 test (Xiao et al. 2017).

    Needs no path if Debian's package dataset-fashion-mnist is installed.
    """

    name = "fashion_mnist"
    licence = "MIT (Zalando SE)"
    title = "Fashion-MNIST, 60,000 + 10,000 pictures of clothes of 10 classes, 28x28"
    origin = (
        "zalandoresearch/fashion-mnist has its idx files: give their folder. With Debian's package "
        "dataset-fashion-mnist no path is needed"
    )
    usual = "fashion-mnist"
    known_names = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
    installed = "/usr/share/datasets/fashion-mnist"


@hookimpl(api=2)
def register_datasets(register) -> None:
    for cls in (Cifar10, Ffhq, ImageNet64, LsunBedroom, CelebaHq, AfhqV2, Mnist, FashionMnist):
        register(cls)
