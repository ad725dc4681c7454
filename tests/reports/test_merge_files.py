"""Samples, influences and trials of searches in a merged folder, against the runs that they come from."""

import json

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import save_file

from distillbench.errors import UserError
from distillbench.records.influences import run_file, tensor_name
from distillbench.records.table import write_table
from distillbench.reports.merge import merge, write
from distillbench.reports.merge_files import merge_trials
from distillbench.reports.runs import read_run
from distillbench.reports.tuning_data import read_trials
from tables_of_runs import COLUMNS, row, run_folder

GOAL = {"metric": "fid", "direction": "lower", "nfe": 1}


def trials(method, scores, **settings):
    base = {"method": method, "status": "ok", "metric": "fid", "nfe": 1, "reason": ""}
    return pd.DataFrame([base | {"trial": k, "score": x} | settings for k, x in enumerate(scores)])


def tuned(folder, table, chosen, protocol="equal_trials", seeds=(0, 1)):
    folder.mkdir(parents=True, exist_ok=True)
    write_table(table, folder, "trials")
    plain = {"tune": {"protocol": protocol, "search_seeds": list(seeds)}, "goal": GOAL, "chosen": chosen}
    (folder / "tuning.json").write_text(json.dumps(plain))
    return folder


def merged(folders, output, keep=None):
    write(merge([read_run(folder) for folder in folders], keep), output)
    return read_run(output)


@pytest.mark.parametrize(("keep", "kept"), [(None, 0), ("first", 0), ("last", 1)])
def test_influences_and_samples_are_copied_with_their_keys(tmp_path, keep, kept):
    """Of two files for one key, that of the run whose row is kept."""
    folders = []
    for k in range(2):
        folder = run_folder(tmp_path / f"r{k}", [row(training_seed=k, key=f"own{k}"), row(training_seed=9, key="both")])
        for key, value in ((f"own{k}", 10.0 + k), ("both", float(k))):
            run_file(folder, key).parent.mkdir(exist_ok=True)
            save_file({tensor_name(1, 0, "fid"): np.full(4, value, np.float32)}, run_file(folder, key))
        (folder / "samples").mkdir()
        (folder / "samples" / f"own{k}-1.png").write_bytes(b"png")
        folders.append(folder)
    run = merged(folders, tmp_path / "m", keep)
    assert sorted(run.table["key"]) == ["both", "own0", "own1"]
    for key, value in (("own0", 10), ("own1", 11), ("both", kept)):
        assert run.influences.of(key, 1, 0, "fid").tolist() == [value] * 4
    assert sorted(path.name for path in (run.folder / "samples").iterdir()) == ["own0-1.png", "own1-1.png"]


def test_trials_of_several_methods_become_one_table(tmp_path):
    for k, (name, setting) in enumerate((("boot", "setting:lr"), ("cm", "setting:rate"))):
        folder = run_folder(tmp_path / name, [row(method=name)])
        tuned(folder, trials(name, [3.0, 2.0 + k], **{setting: "0.1"}), {name: {"training": {"trial": 1}}}, seeds=[k])
    run = merged([tmp_path / "boot", tmp_path / "cm"], tmp_path / "m")
    found = read_trials(run.folder, COLUMNS)
    assert found.problems == [] and (found.metric, found.direction, found.protocol) == ("fid", "lower", "equal_trials")
    assert {name: [one.score for one in own] for name, own in found.methods.items()} == {"boot": [3, 2], "cm": [3, 3]}
    assert [own[0].settings for own in found.methods.values()] == [{"lr": 0.1}, {"rate": 0.1}]
    plain = json.loads((run.folder / "tuning.json").read_text())
    assert plain["tune"] == {"protocol": "equal_trials"}, "seeds differ, so none are claimed"
    assert plain["chosen"] == {"boot": {"training": {"trial": 1}}, "cm": {"training": {"trial": 1}}}


def test_of_two_searches_of_a_method_the_first_is_kept_with_its_choice_and_a_note(tmp_path):
    a = tuned(tmp_path / "a", trials("boot", [3.0, 2.0]), {"boot": {"training": {"trial": 1}}})
    b = tuned(tmp_path / "b", trials("boot", [1.0, 2.0]), {"boot": {"training": {"trial": 0}}}, "equal_total")
    found = merge_trials([a, b], ["a", "b"])
    assert found.notes == ["trials of boot differ in a and b: those of a are kept"]
    assert found.tables["trials"]["score"].tolist() == [3, 2]
    assert found.settings["chosen"]["boot"]["training"]["trial"] == 1 and "protocol" not in found.settings["tune"]
    assert merge_trials([a, a], ["a", "a2"]).notes == []
    (a / "trials.parquet").unlink()
    assert merge_trials([a, a], ["a", "a2"]).tables["trials"]["score"].tolist() == [3, 2]


@pytest.mark.parametrize(("file", "what"), [("trials.csv", "trials"), ("tuning.json", "tuning.json")])
def test_a_damaged_search_is_refused(tmp_path, file, what):
    folder = tuned(tmp_path / "a", trials("boot", [3.0]), {})
    (folder / "trials.parquet").write_bytes(b"PAR1")
    (folder / file).write_bytes(b"\xff\xfe{")
    with pytest.raises(UserError, match=f"a: its {what} is damaged and cannot be merged"):
        merge_trials([folder], ["a"])


def test_runs_without_searches_have_none(tmp_path):
    found = merge_trials([tmp_path], ["a"])
    assert not found.tables and not found.settings and not found.notes
