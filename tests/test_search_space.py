"""Search spaces: what is declared beside a setting, and what a method searches."""

from dataclasses import dataclass

import pytest
from click.testing import CliRunner

from distillbench import MethodConfig, NetworkConfig, UserError, canonical_json, option
from distillbench.cli.plugin_commands import describe
from distillbench.options import (
    Among,
    Between,
    declares_search_space,
    plain_settings,
    search_space,
    setting_of,
    with_settings,
)


@dataclass
class Silent(MethodConfig):
    lr: float = option(3e-4, "of this method")
    steps: int = option(4, "not searched")


@dataclass
class Declaring(MethodConfig):
    ema_halflife_kimg: float = option(0.0, "fixed", search=Among([0.0]))
    steps: int = option(4, "K", search=Between(1, 8))
    weight: str = option("one", "w", search=Among(["one", "snr"]))
    fake: NetworkConfig = option(NetworkConfig(), "of the fake score", search={"lr": Among([None, 1e-3])})
    gamma: float = option(0.0, "of sampling", sampling=True, search=Between(0.0, 1.0))
    fixed: float = option(1.0, "not searched")


def test_a_method_that_declares_nothing_searches_learning_rate_and_average_around_its_defaults():
    assert not declares_search_space(Silent)
    expected = {"lr": Between(6e-5, 1.5e-3, log=True), "ema_halflife_kimg": Between(2.0, 50.0, log=True)}
    assert search_space(Silent) == expected


def test_a_method_without_an_average_searches_whether_to_have_one():
    @dataclass
    class WithoutAverage(MethodConfig):
        ema_halflife_kimg: float = option(0.0, "none")

    assert search_space(WithoutAverage)["ema_halflife_kimg"] == Among([0.0, 2.0, 10.0, 50.0])


def test_a_declared_space_is_in_the_order_of_the_fields_and_without_what_is_fixed():
    assert declares_search_space(Declaring)
    space = search_space(Declaring)
    assert list(space) == ["lr", "steps", "weight", "fake.lr"]
    assert space["steps"] == Between(1, 8) and space["fake.lr"] == Among([None, 1e-3])
    assert search_space(Declaring, sampling=True) == {"gamma": Between(0.0, 1.0)}


def test_a_search_changes_no_key():
    @dataclass
    class Searched(MethodConfig):
        lr: float = option(3e-4, "of this method", search=Between(1e-4, 1e-2, log=True))
        steps: int = option(4, "not searched")

    assert canonical_json(plain_settings(Searched())) == canonical_json(plain_settings(Silent()))


def test_settings_by_their_names_in_the_space():
    config = with_settings(Declaring(), {"lr": 0.5, "fake.lr": 1e-3, "fake.beta1": 0.0})
    assert (config.lr, config.fake.lr, config.fake.beta1, config.steps) == (0.5, 1e-3, 0.0, 4)
    assert setting_of(config, "fake.lr") == 1e-3 and setting_of(config, "steps") == 4
    assert Declaring().fake.lr is None
    with pytest.raises(UserError, match="lr must be positive, got -1"):
        with_settings(Declaring(), {"fake.lr": -1.0})


@pytest.mark.parametrize(
    ("search", "inside", "outside"),
    [
        (Between(1, 8), [1, 8], [0, 9, 2.0, True]),
        (Between(0.5, 8.0), [0.5, 8.0], [0.4, 2, "2"]),
        (Between(2, 10, step=4), [2, 6, 10], [4]),
        (Between(0.1, 0.7, step=0.2), [0.1, 0.3, 0.5, 0.7], [0.2]),
        (Among([1, "a", None]), [1, "a", None], [1.0, True, "b"]),
        (Among([[1, 2], [2]]), [[1, 2]], [[1]]),
    ],
)
def test_what_lies_in_a_search(search, inside, outside):
    assert all(value in search for value in inside)
    assert not any(value in search for value in outside)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: Between(2, 2), "is empty: low must be below high"),
        (lambda: Between(0.0, 1.0, log=True), "has a logarithm: low must be positive"),
        (lambda: Between(1, float("inf")), "must have finite numbers only"),
        (lambda: Between(False, 2), "must have finite numbers only"),
        (lambda: Between(1, 8, log=True, step=1), "has steps and a logarithm: name one of them"),
        (lambda: Between(1, 8, step=2), "whole steps of which lead from low to high"),
        (lambda: Between(1, 8, step=-7), "must have a positive step"),
        (lambda: Among([]), "must have different values, at least one"),
        (lambda: Among([1, 2, 1]), "must have different values"),
        (lambda: Among([object()]), "must have values that JSON has"),
        (lambda: Among([float("nan")]), "must have values that JSON has"),
    ],
)
def test_wrong_searches_are_refused(wrong, message):
    with pytest.raises(UserError, match=message):
        wrong()


def test_describe_names_the_space(tmp_path):
    (tmp_path / "declaring.py").write_text(
        "from dataclasses import dataclass\n"
        "from distillbench import Method, MethodConfig, hookimpl, option\n"
        "from distillbench.options import Between\n"
        "class Silent(Method):\n"
        "    name, paper, needs_data, Config = 'silent', 'none', False, MethodConfig\n"
        "    def train_step(self, batch): yield\n"
        "    def sample(self, noise, nfe, c): pass\n"
        "class Declaring(Silent):\n"
        "    name = 'declaring'\n"
        "    @dataclass\n"
        "    class Config(MethodConfig):\n"
        "        steps: int = option(4, 'steps', search=Between(1, 64, log=True))\n"
        "        gamma: float = option(0.0, 'noise', sampling=True, search=Between(0.0, 1.0))\n"
        "@hookimpl(api=2)\n"
        "def register_methods(register):\n"
        "    register(Silent)\n"
        "    register(Declaring)\n"
    )

    def described(name):
        ran = CliRunner().invoke(describe, [name, "--plugins-dir", str(tmp_path)], catch_exceptions=False)
        return " ".join(ran.output.split()).partition("settings that distillbench tune searches: ")[2]

    alone = "The plugin declares none: learning rate and average alone are searched, around their defaults."
    assert described("silent").startswith(alone)
    assert "methods.silent.lr 0.0002 to 0.005, in the logarithm" in described("silent")
    assert alone not in described("declaring")
    assert "methods.declaring.steps 1 to 64, in the logarithm, whole numbers" in described("declaring")
    assert described("declaring").endswith("(tune.after): methods.declaring.gamma 0 to 1")
