"""A conformance suite: the contract of :mod:`distillbench.method`, held against any method, ours or a stranger's.

    from distillbench.testing import assert_conforms

    def test_my_method():
        assert_conforms(MyMethod)

On the command line: ``distillbench check NAME``. Each check (:mod:`distillbench.conformance`) runs by itself on a bench
(:mod:`distillbench.testbench`): an error in one is its finding, and the others go on. Nothing global is left changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from distillbench import conformance
from distillbench.conformance import NotApplicable, where
from distillbench.method import Method, MethodConfig
from distillbench.testbench import CONDITIONINGS, Bench, Fault, isolated

LAW_IMAGES = 200_000  # of the training on an exact teacher, with which every method that ships passes


@dataclass(frozen=True)
class Finding:
    """What a check found. `ok` is None where it does not apply; `message` says in words what was seen, and why."""

    check: str
    ok: bool | None
    message: str


def check_method(cls: type[Method], config: MethodConfig | None = None, law_images: int = LAW_IMAGES) -> list[Finding]:
    """What every check finds in `cls` with the settings `config` (None: its defaults).

    `law_images` is how long the last check, ``matches``, trains on an exact teacher; 0 leaves it out. The others take
    seconds.
    """
    return list(findings(cls, config, law_images))


def assert_conforms(cls: type[Method], config: MethodConfig | None = None, law_images: int = LAW_IMAGES) -> None:
    """Raise AssertionError, with the messages, if any check fails."""
    failed = [finding for finding in findings(cls, config, law_images) if finding.ok is False]
    lines = [f"{finding.check}: {finding.message}" for finding in failed]
    if lines:
        raise AssertionError("\n".join([f"{cls.__name__} breaks the contract of a method", *lines]))


def findings(cls: type[Method], config: MethodConfig | None = None, law_images: int = LAW_IMAGES) -> Iterator[Finding]:
    """What :func:`check_method` returns, one by one as it is known."""
    benches = [Bench(label, cls, config, conditioning, law_images) for label, conditioning in CONDITIONINGS.items()]
    closed: dict[str, dict[str, str]] = {}  # check: benches closed to those that need it, each with the check at fault
    for check in CHECKS:
        result = check.on(benches, closed)
        closed[check.name] = result.closed
        yield result.finding(check)


# --- how checks are run ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """What a check said on each bench, by the bench's label."""

    passed: dict[str, str]
    faults: dict[str, str]
    excused: dict[str, str]
    closed: dict[str, str]  # benches that are of no use to the checks that need this one: the check at fault

    def finding(self, check: Check) -> Finding:
        if self.faults:
            return Finding(check.name, False, self._told(self.faults))
        if self.passed:
            first = next(iter(self.passed.values()))
            return Finding(check.name, True, f"{first}; {self._told(self.excused)}" if self.excused else first)
        if self.excused:
            return Finding(check.name, False if check.must_apply else None, self._told(self.excused))
        causes = ", ".join(sorted(set(self.closed.values())))
        return Finding(check.name, None, f"not looked at before {causes} is ok" if causes else "no bench for it")

    def _told(self, by_label: dict[str, str]) -> str:
        """The first message, with the benches on which there is one unless it is all of them."""
        message = next(iter(by_label.values()))
        count = len(self.passed) + len(self.faults) + len(self.excused)
        return message if len(by_label) == count else f"{', '.join(by_label)}: {message}"


@dataclass(frozen=True)
class Check:
    """A check and where it is run: on "every" bench, on the "first" one, or on those with classes ("conditional").

    It is not run where a check that it `needs` has failed. With `must_apply` it fails where it applies to no bench.
    """

    run: Callable[[Bench], str]
    needs: tuple[str, ...] = ()
    benches: str = "every"
    must_apply: bool = False

    @property
    def name(self) -> str:
        return self.run.__name__

    def on(self, benches: list[Bench], closed: dict[str, dict[str, str]]) -> Result:
        """Run where it can be; `closed` is what the checks before have closed."""
        shut = {label: cause for need in self.needs for label, cause in closed[need].items()}
        result = Result({}, {}, {}, shut)
        for bench in self._chosen([bench for bench in benches if bench.label not in shut]):
            try:
                with isolated():
                    result.passed[bench.label] = self.run(bench)
            except NotApplicable as reason:
                result.excused[bench.label] = str(reason)
            except Fault as fault:
                result.faults[bench.label] = str(fault)
            except (Exception, SystemExit) as error:  # a stranger's code may fail in any way
                result.faults[bench.label] = where(error, bench.cls)
        for bench in benches:
            failed = bench.label in result.faults or (self.benches == "first" and result.faults)
            if failed or (self.must_apply and bench.label in result.excused):
                shut.setdefault(bench.label, self.name)
        return result

    def _chosen(self, benches: list[Bench]) -> list[Bench]:
        if self.benches == "conditional":
            return [bench for bench in benches if bench.conditioning.classes]
        return benches[:1] if self.benches == "first" else benches


CHECKS = [
    Check(conformance.declared, benches="first"),
    Check(conformance.builds, ("declared",), must_apply=True),
    Check(conformance.phases, ("builds",), "first"),
    Check(conformance.data, ("phases",), "first"),
    Check(conformance.steps, ("data",), "first"),
    Check(conformance.condition, ("steps",), "conditional"),
    Check(conformance.losses, ("steps", "condition")),
    Check(conformance.gradients, ("losses",)),
    Check(conformance.only_yielded, ("losses",)),
    Check(conformance.teacher_untouched, ("losses",)),
    Check(conformance.trains, ("losses",)),
    Check(conformance.randomness, ("trains",)),
    Check(conformance.deterministic, ("randomness",)),
    Check(conformance.price, ("trains",)),
    Check(conformance.supports, ("trains",), "first"),
    Check(conformance.samples, ("supports",), "first"),
    Check(conformance.condition_sampled, ("samples",), "conditional"),
    Check(conformance.nfe, ("samples", "condition_sampled")),
    Check(conformance.uncounted, ("samples", "condition_sampled")),
    Check(conformance.noise, ("samples", "condition_sampled")),
    Check(conformance.batch_independent, ("noise",)),
    Check(conformance.average, ("noise",)),
    Check(conformance.save_load, ("noise",)),
    Check(conformance.matches, ("samples",), "first"),
]
