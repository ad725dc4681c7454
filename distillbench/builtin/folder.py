"""Your own images from a folder or another source, centre-cropped and resized."""

from __future__ import annotations

from dataclasses import dataclass

from distillbench import hookimpl, option
from distillbench.datasets.image_dataset import ACCEPTED, FileConfig, FileDataset
from distillbench.options import require_one_of


class Folder(FileDataset):
    """Your own images: a folder, or any other source that published datasets can be read from."""

    name = "folder"
    licence = "that of the images"
    title = "a folder of images, or another source of them"
    origin = ""
    usual = "IMAGES"

    @dataclass
    class Config(FileConfig):
        channels: int = option(3, "3: colour; 1: grey")

        def __post_init__(self) -> None:
            super().__post_init__()
            require_one_of(self, "channels", (1, 3))

    config: Config

    def _channels(self) -> int:
        return self.config.channels

    def _missing(self) -> str:
        return f"dataset=folder needs dataset.path=FOLDER, a folder of images, or another source of them: {ACCEPTED}"


@hookimpl(api=2)
def register_datasets(register) -> None:
    register(Folder)
