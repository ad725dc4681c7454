"""The published results: the shipped file, and what the checks refuse."""

from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest

from distillbench.errors import UserError
from distillbench.registry import load_registry
from distillbench.reports.published import CASE, COLUMNS, FILE, LABEL, published, published_section, read_published

ELSEWHERE = {"coco", "imagenet256"}  # datasets of the literature that distillbench does not name
ROW = dict.fromkeys(COLUMNS, "") | {
    "method": "PD",
    "dataset": "cifar10",
    "resolution": "32",
    "nfe": "1",
    "metric": "FID",
    "value": "9.12",
    "data_free": "no",
    "source": "arXiv:2202.00512",
    "read": "first-hand",
}


@pytest.fixture(scope="module")
def shipped():
    return read_published()


def file_of(folder: Path, *rows: dict[str, str], columns=tuple(COLUMNS)) -> Path:
    path = folder / "published.csv"
    pd.DataFrame([ROW | row for row in rows], columns=list(columns)).to_csv(path, index=False)
    return path


def run_of(*datasets: object) -> SimpleNamespace:
    return SimpleNamespace(configs=[{"dataset": dataset} for dataset in datasets])


def test_types(shipped):
    assert {name: str(kind) for name, kind in shipped.dtypes.items()} == COLUMNS
    assert len(shipped) > 150


def test_datasets_are_those_of_the_registry(shipped):
    assert set(shipped["dataset"]) <= set(load_registry().datasets) | ELSEWHERE
    side = {"cifar10": {32}, "imagenet64": {64}, "ffhq": {64}, "lsun_bedroom": {256}}
    found = shipped.groupby("dataset")["resolution"].agg(set)
    assert {name: found[name] for name in side} == side


def test_every_row_has_a_source_that_can_be_found(shipped):
    """A paper by its number, or a repository as owner/name."""
    parts = shipped["source"].str.split("; ").explode()
    assert parts.str.fullmatch(r"arXiv:\d{4}\.\d{5}(, .+)?|[\w.-]+/[\w.-]+( README)?").all()


def test_values_are_plausible(shipped):
    fid, inception = (shipped[shipped["metric"] == name]["value"] for name in ("FID", "IS"))
    assert len(fid) + len(inception) == len(shipped)
    assert fid.between(1, 30).all()
    assert inception.between(8, 11).all()


def test_disputed_rows_contradict_each_other(shipped):
    """Every case with two values is disputed in all its rows, and no other is; each says how it was read."""
    disputed = shipped[shipped["read"] == "disputed"]
    for _, case in disputed.groupby(CASE, dropna=False):
        assert len(case) >= 2
        assert case["value"].nunique() >= 2
    assert disputed["note"].str.match("read (first|second)-hand").all()


@pytest.mark.parametrize(
    ("method", "dataset", "nfe", "values"),
    [
        ("PD", "cifar10", 1, {9.12, 8.34}),
        ("PD", "imagenet64", 1, {15.39, 10.70}),
        ("DFNO", "cifar10", 1, {4.12, 3.78}),
        ("DDIM", "cifar10", 10, {13.36, 8.23}),
        ("sCT", "cifar10", 1, {2.85, 2.97}),
        ("Diff-Instruct", "cifar10", 1, {4.53, 5.57}),
        ("EDM", "cifar10", 35, {1.97, 2.04, 2.01}),
    ],
)
def test_known_conflicts_are_all_kept(shipped, method, dataset, nfe, values):
    case = shipped[(shipped["method"] == method) & (shipped["dataset"] == dataset) & (shipped["nfe"] == nfe)]
    case = case[case["metric"] == "FID"]
    assert set(case["value"]) == values
    assert set(case["read"]) == {"disputed"}


@pytest.mark.parametrize(
    ("dataset", "method", "value"),
    [("cifar10", "BOOT", 6.88), ("ffhq", "BOOT", 9.0), ("lsun_bedroom", "BOOT", 23.4), ("coco", "DMD", 11.49)],
)
def test_what_was_only_remembered_is_left_out(shipped, dataset, method, value):
    assert not (shipped["dataset"].eq(dataset) & shipped["method"].eq(method) & shipped["value"].eq(value)).any()


def test_of_one_dataset_and_resolution():
    found = published("lsun_bedroom", 256)
    assert len(found) == 9
    assert set(found["dataset"]) == {"lsun_bedroom"}
    one = found[(found["method"] == "CD") & (found["nfe"] == 1)].iloc[0]
    assert (one["value"], one["precision"], one["recall"]) == (7.80, 0.66, 0.34)
    for nothing in (published("lsun_bedroom", 128), published("nowhere", 32)):
        assert len(nothing) == 0
        assert {name: str(kind) for name, kind in nothing.dtypes.items()} == COLUMNS
    found.loc[:, "value"] = 0.0
    assert published("lsun_bedroom", 256)["value"].min() > 0, "a caller can change the data of the next"


def test_section_has_the_run_s_dataset_and_resolution_only():
    ffhq, cifar = {"kind": "ffhq", "resolution": 64}, {"kind": "cifar10", "resolution": 32}
    assert set(published_section([run_of(ffhq, ffhq)])["method"]) == {"SiD (alpha 1.2)"}
    assert len(published_section([run_of(ffhq)])) == 1
    assert len(published_section([run_of({"kind": "ffhq", "resolution": 256})])) == 0
    assert set(published_section([run_of(ffhq), run_of(cifar)])["dataset"]) == {"ffhq", "cifar10"}
    for unknown in ({"kind": "digits"}, {"kind": "ffhq"}, {"kind": "ffhq", "resolution": "64"}, None, "ffhq"):
        empty = published_section([run_of(unknown)])
        assert len(empty) == 0
        assert list(empty) == list(COLUMNS)
    assert len(published_section([])) == 0
    assert "not comparable" in LABEL


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"source": ""}], "line 2: no source"),
        ([{}, {"value": "8.34"}], r"line 2, 3: another value has the same .* all must be disputed"),
        ([{"read": "disputed"}], "line 2: disputed, but no other value"),
        ([{}, {}], "line 3: the same as an earlier row"),
        ([{"value": "nine"}], "line 2: value is no number"),
        ([{"nfe": "1.5"}], "line 2: nfe is no whole number"),
        ([{"recall": "63"}], "line 2: recall is not within 0 and 1"),
        ([{"value": "-1"}], "line 2: value is not within"),
        ([{"value": "inf"}], "line 2: value is not within"),
        ([{"read": "hearsay"}], "line 2: read is none of first-hand"),
        ([{"data_free": "maybe"}], "line 2: data_free is none of yes"),
        ([{"method": " PD"}], "line 2: spaces around"),
    ],
)
def test_faults_are_named_with_their_line(tmp_path, rows, message):
    with pytest.raises(UserError, match=message):
        read_published(file_of(tmp_path, *rows))


def test_rows_that_are_right(tmp_path):
    pair = [{"read": "disputed"}, {"read": "disputed", "value": "8.34", "source": "arXiv:2303.01469"}]
    assert read_published(file_of(tmp_path, *pair, {"nfe": ""}, {"metric": "IS", "method": "NA"})).shape[0] == 4


def test_other_columns_and_no_file(tmp_path):
    with pytest.raises(UserError, match="Needed: method, teacher"):
        read_published(file_of(tmp_path, {}, columns=("method", "value")))
    with pytest.raises(UserError, match="cannot be read"):
        read_published(tmp_path / "none.csv")


def test_more_fields_than_columns(tmp_path):
    file = file_of(tmp_path, {})
    header, *rows = file.read_text().splitlines()
    file.write_text("\n".join([header, *(f"more,{row}" for row in rows)]) + "\n")
    with pytest.raises(UserError, match="rows of more than"):
        read_published(file)


def test_the_page_explains_every_column():
    page = (FILE.parents[2] / "docs" / "published.md").read_text(encoding="utf-8")
    assert not [name for name in COLUMNS if f"`{name}`" not in page]
