"""dataset=prompts: texts from every kind of file, and separate prompts for evaluation."""

import json

import pyarrow
import pyarrow.parquet
import pytest
import torch

from distillbench.builtin.prompts import Prompts
from distillbench.diffusion.conditioning import Conditioning
from distillbench.errors import UserError

TEXTS = ["a red cat", "a dog, running", 'a "quoted" word', "ein Bär"]


def prompts(path, **settings):
    return Prompts(Prompts.Config(kind="prompts", path=str(path), **settings))


def write(folder, name, texts=TEXTS, column="prompt"):
    path = folder / name
    if path.suffix == ".txt":
        path.write_text("\n".join(texts) + "\n", encoding="utf-8")
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps({"id": 1, column: text}) for text in texts) + "\n")
    elif path.suffix == ".csv":
        quoted = ['"' + text.replace('"', '""') + '"' for text in texts]
        path.write_text(f"id,{column}\n" + "\n".join(f"1,{text}" for text in quoted), encoding="utf-8")
    else:
        pyarrow.parquet.write_table(pyarrow.table({"id": [1] * len(texts), column: texts}), path)
    return path


@pytest.mark.parametrize("column", ["prompt", "caption", "text"])
@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".csv", ".parquet"])
def test_the_same_texts_from_every_kind_of_file(tmp_path, suffix, column):
    dataset = prompts(write(tmp_path, f"a{suffix}", column=column))
    assert dataset.prompts == TEXTS
    assert (len(dataset), dataset.classes, dataset.shape, dataset.evaluated) == (0, 4, (3, 512, 512), None)
    assert dataset.sha256 == prompts(write(tmp_path, "other.txt")).sha256


def test_lines_of_jsonl_may_be_texts(tmp_path):
    (tmp_path / "a.jsonl").write_text('"a cat"\n\n{"text": "a dog"}\n')
    assert prompts(tmp_path / "a.jsonl").prompts == ["a cat", "a dog"]


def test_empty_lines_are_ignored_and_white_space_is_one_space(tmp_path):
    (tmp_path / "a.txt").write_text("\ufeff a\tcat \r\n\n   \na dog", encoding="utf-8")
    assert prompts(tmp_path / "a.txt").prompts == ["a cat", "a dog"]


def test_evaluation_prompts_come_last_and_are_not_trained_on(tmp_path):
    trained, asked = write(tmp_path, "a.txt"), write(tmp_path, "b.csv", ["x", "y"])
    dataset = prompts(trained, evaluation_path=str(asked), limit=3, resolution=64)
    assert dataset.prompts == [*TEXTS[:3], "x", "y"]
    assert (dataset.evaluated, dataset.classes, dataset.shape) == (range(3, 5), 5, (3, 64, 64))
    assert dataset.split == "3 prompts, evaluated on 2 others"
    conditioning = Conditioning(dataset.classes, evaluated=dataset.evaluated)
    assert conditioning.labels_of_images(range(3)).tolist() == [3, 4, 3]
    assert conditioning.trained == 3


def test_the_hash_depends_on_the_texts_and_the_evaluation_prompts(tmp_path):
    a, b = write(tmp_path, "a.txt", ["x", "y"]), write(tmp_path, "b.txt", ["x"])
    c = write(tmp_path, "c.txt", ["y"])
    hashes = [prompts(a).sha256, prompts(b).sha256, prompts(b, evaluation_path=str(c)).sha256]
    assert len(set(hashes)) == 3
    assert prompts(a, limit=1).sha256 == prompts(b).sha256
    assert prompts(a, resolution=64).sha256 == prompts(a).sha256


def test_there_are_no_images_to_read(tmp_path):
    with pytest.raises(UserError, match="dataset=prompts has no images"):
        prompts(write(tmp_path, "a.txt")).read(torch.tensor([0]))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "", r"no prompt in 'a\.txt'"),
        ("a.txt", " \n\n", r"no prompt in 'a\.txt'"),
        ("a.txt", b"\xff\xfe\xfa", r"cannot read 'a\.txt'"),
        ("a.jsonl", "{", r"cannot read 'a\.jsonl'"),
        ("a.jsonl", '{"words": "x"}', r"line 1 of 'a\.jsonl' has no prompt, caption or text; it has words"),
        ("a.jsonl", '{"text": 3}', r"line 1 of 'a\.jsonl' is not a text"),
        ("a.csv", "id,words\n1,x\n", r"'a\.csv' has no prompt, caption or text; it has id, words"),
        ("a.csv", "", r"'a\.csv' has no prompt"),
        ("a.parquet", b"PAR1nothing", r"cannot read 'a\.parquet'"),
        ("a.json", "{}", r"no kind of file '\.json' for prompts .*Did you mean '\.jsonl'\? Possible: \.csv, \.jsonl"),
    ],
)
@pytest.mark.parametrize("setting", ["path", "evaluation_path"])
def test_a_file_without_prompts_is_refused(tmp_path, name, content, message, setting):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    paths = {"path": str(write(tmp_path, "good.txt"))} | {setting: str(tmp_path / name)}
    with pytest.raises(UserError, match=message) as caught:
        prompts(**paths)
    assert f"dataset.{setting}" in str(caught.value)


def test_no_path_and_a_wrong_path(tmp_path):
    with pytest.raises(UserError, match=r"dataset=prompts needs dataset\.path=FILE"):
        prompts("")
    write(tmp_path, "coco.txt")
    with pytest.raises(UserError, match=r"dataset\.path: no file .*Did you mean 'coco\.txt'\?"):
        prompts(tmp_path / "cocoo.txt")
    with pytest.raises(UserError, match="limit must"):
        Prompts.Config(limit=-1)


def test_rows_without_text_are_counted_and_the_first_of_several_texts_is_used(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [["a", "b"], None, ["c"], []]
    pyarrow.parquet.write_table(pyarrow.table({"text": rows}), tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    for name in ("a.parquet", "a.jsonl"):
        found = prompts(tmp_path / name)
        assert list(found.prompts) == ["a", "c"]
        assert list(found.notes) == [
            f"{name}: 2 of 4 rows have no text and are ignored",
            f"{name}: 1 of 4 rows have several texts: the first is used",
        ]
    (tmp_path / "a.txt").write_text("a\n\nb\n")
    assert list(prompts(tmp_path / "a.txt").notes) == []
