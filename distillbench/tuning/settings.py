"""The settings ``tune.*``: how a search is made, and what its results are reported with."""

from __future__ import annotations

from dataclasses import dataclass

from distillbench.errors import UserError
from distillbench.options import option, require_between, require_one_of

PROTOCOLS = ("equal_trials", "self_tuned", "defaults")
SAMPLERS = ("tpe", "random")
PRUNINGS = ("none", "halving")
UNITS = ("images", "seconds", "joules")
LARGEST_SEED = 2**31 - 1


@dataclass
class TotalConfig:
    """What protocol=self_tuned lets each method spend on all its trials together. Only what `limit` names counts."""

    limit: str = option("images", "what is limited: images, seconds or joules of training")
    images: int = option(0, "training images of all trials of a method")
    seconds: float = option(0.0, "seconds of training of all trials of a method")
    joules: float = option(0.0, "joules of training of all trials of a method")

    def __post_init__(self) -> None:
        require_one_of(self, "limit", UNITS)
        require_between(self, 0, float("inf"), *UNITS)

    @property
    def amount(self) -> float:
        return {"images": self.images, "seconds": self.seconds, "joules": self.joules}[self.limit]

    @property
    def in_words(self) -> str:
        """Such as "4,800,000 images"."""
        return f"{self.amount:,.10g} {self.limit}"


@dataclass
class TuneConfig:
    """How the settings of each method are searched, the same for all methods."""

    protocol: str = option("equal_trials", "equal_trials, self_tuned (a total budget each) or defaults (no search)")
    trials: int = option(16, "trials of each method, the first with its defaults; with self_tuned at most so many")
    metric: str = option("", "score that is optimised; empty: the first of evaluation.metrics that has a direction")
    nfe: int = option(0, "network evaluations of the row that is optimised; 0: the fewest that all methods can do")
    sampler: str = option("tpe", "how settings are chosen: tpe (Optuna's TPESampler) or random")
    sampler_seed: int = option(0, "of the sampler")
    search_seeds: list[int] = option([1000], "training seeds of a trial, whose score is the mean over them")
    final_seeds: list[int] = option([0, 1], "training seeds with which the best settings are trained anew")
    total: TotalConfig = option(TotalConfig, "with self_tuned: what each method may spend on its trials")
    pruning: str = option("none", "none, or halving: a trial first trains a quarter of the budget, and the best go on")
    at_once: int = option(
        0, "trials of a method that are chosen together; 0: as all workers of this machine need, 1 on a cluster"
    )

    after: list[str] = option(
        [], "settings of sampling that are searched after training, such as [sampling_levels]; trains nothing"
    )
    after_trials: int = option(8, "trials of this second search, for each method that has one of these settings")
    after_nfe: int = option(2, "network evaluations of the row that it optimises")

    def __post_init__(self) -> None:
        require_one_of(self, "protocol", PROTOCOLS)
        require_one_of(self, "sampler", SAMPLERS)
        require_one_of(self, "pruning", PRUNINGS)
        require_between(self, 1, 100_000, "trials", "after_trials")
        require_between(self, 1, 1024, "after_nfe")
        require_between(self, 0, 1024, "nfe", "at_once")
        require_between(self, 0, LARGEST_SEED, "sampler_seed")
        for name in ("search_seeds", "final_seeds"):
            seeds = getattr(self, name)
            if not seeds or min(seeds) < 0 or len(set(seeds)) != len(seeds):
                raise UserError(f"{name} must list different numbers, none negative, got {seeds}")
        if both := sorted(set(self.search_seeds) & set(self.final_seeds)):
            raise UserError(
                f"final_seeds must not be among search_seeds: the search would see the final trainings. Both have "
                f"{', '.join(map(str, both))}"
            )
        if self.protocol == "self_tuned" and not self.total.amount:
            limit = self.total.limit
            raise UserError(f"protocol self_tuned needs tune.total.{limit}=N, what each method may spend on its trials")

        if self.after and not self.searches:
            raise UserError(f"after={self.after} needs a search, whose students it samples: protocol=defaults has none")

    @property
    def searches(self) -> bool:
        """Whether there is a search at all."""
        return self.protocol != "defaults"

    @property
    def shares(self) -> tuple[float, ...]:
        """The shares of the budget that a trial trains one after the other, each from the beginning."""
        return (0.25, 1.0) if self.pruning == "halving" else (1.0,)
