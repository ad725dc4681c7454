"""The teacher that ``teacher.download=true`` means where no teacher was chosen: the released one of the dataset."""

from __future__ import annotations

from collections.abc import Sequence

from hydra.core.override_parser.types import Override
from omegaconf import DictConfig

from distillbench.errors import UserError
from distillbench.registry import Registry
from distillbench.storage.sources import of_teacher


def released_teacher(point: Sequence[Override], base: DictConfig, registry: Registry) -> str:
    """The family to use instead of the composed default, which has nothing to download, or "" to keep that.

    `point` are the settings of the command line, `base` is what its choices compose to. Raises UserError if no released
    teacher fits.
    """
    given = {setting.key_or_group: setting.value() for setting in point}
    if given.get("teacher.download") is not True or "teacher" in given or "download" in base.teacher:
        return ""
    dataset = base.dataset.kind
    side = given.get("dataset.resolution", base.dataset.get("resolution", 0))
    conditional = given.get("conditional", base.conditional) is True
    source = of_teacher(dataset, side, conditional)
    if source is None:
        other = of_teacher(dataset, side, not conditional)
        hint = f" (for conditional={str(not conditional).lower()} there is {other.name})" if other else ""
        raise UserError(
            f"teacher.download=true: no released teacher is known for dataset={dataset}"
            f"{f' at {side}x{side}' if side else ''} and conditional={str(conditional).lower()}{hint}. Without this "
            f"setting teacher={base.teacher.kind} is used. `distillbench fetch` lists the known ones"
        )
    return registry.get("teachers", source.plugin).cls.name
