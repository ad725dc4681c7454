"""Labels and captions beside images and in tables: what is unambiguous is read, and what is ignored is noted."""

import json
import unicodedata

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from distillbench.builtin.folder import Folder
from distillbench.datasets.annotations import as_classes
from distillbench.datasets.image_dataset import open_source
from distillbench.errors import UserError
from image_sources import make, pixels, png, write_folder, write_zip

PNG = png(pixels(1)[0])


def lines(*rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def images(*names):
    return dict.fromkeys(names, PNG)


def open_at(path, **settings):
    return open_source(str(path), **settings)


# --- labels as classes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "numbers", "names", "count"),
    [
        ([2, 0, 1], [2, 0, 1], (), 0),
        ([2.0, 0.0], [2, 0], (), 0),
        (np.array([2.0, 0.0]), [2, 0], (), 0),
        (["2", "0"], [2, 0], (), 0),
        (["2.0", "0.0"], [2, 0], (), 0),
        ([True, False], [1, 0], (), 0),
        ([[2], [0]], [2, 0], (), 0),
        ([[0, 1, 0], [1, 0, 0]], [1, 0], (), 3),
        (np.array([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]), [1, 0], (), 3),
        (["dog", "cat", "dog"], [1, 0, 1], ["cat", "dog"], 0),
        ([b"dog", b"cat"], [1, 0], ["cat", "dog"], 0),
        (["7", "cat"], [0, 1], ["7", "cat"], 0),
        ([-1, -1], None, (), 0),
        ([None, float("nan")], None, (), 0),
        (["-1", ""], None, (), 0),
    ],
)
def test_unambiguous_labels_become_classes(values, numbers, names, count):
    found = as_classes(values, "a")
    assert (None if found.numbers is None else found.numbers.tolist()) == numbers
    assert (list(found.names), found.count) == (list(names), count)
    assert bool(found.notes) == (numbers is None or bool(names))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([0, -1, 1], r"1 of 3 are -1 or null, such as that of 'row 1'\. dataset\.labels=none reads"),
        ([0, None], "1 of 2 are -1 or null"),
        ([0, -2], "the label of 'row 1' must be a class, got '-2'"),
        ([0, 0.5], "must be a class, got '0.5'"),
        ([0, "cat"], "must be a class, got"),
        ([[0, 1], [1, 1]], r"must be a class, got '\[0, 1\]'"),
        ([[0, 1], [1, 0, 0]], "must be a class"),
        ([2**31], "must be a class"),
        ([{"a": 1}], "must be a class"),
    ],
)
def test_ambiguous_labels_are_refused(values, message):
    with pytest.raises(UserError, match=f"labels must be classes 0, 1, .*{message}"):
        as_classes(values, "a")


@pytest.mark.parametrize("labels", [[0, -1], ["x", 0.5], [[1, 1], [0, 1]], [{"a": 1}, 0]])
def test_labels_are_not_read_unless_asked_for(tmp_path, labels):
    pairs = [list(pair) for pair in zip(["0.png", "1.png"], labels, strict=True)]
    write_folder(tmp_path / "a", images("0.png", "1.png") | {"dataset.json": json.dumps({"labels": pairs})})
    np.savez(tmp_path / "b.npz", images=pixels(2), labels=np.array([0.5, -1.0]))
    sources = [tmp_path / "a", tmp_path / "b.npz"]
    if not isinstance(labels[1], float | int) or labels == [0, -1]:
        table = pyarrow.table({"image": [PNG, PNG], "label": labels})
        pyarrow.parquet.write_table(table, tmp_path / "c.parquet")
        sources.append(tmp_path / "c.parquet")
    for source in sources:
        with pytest.raises(UserError, match=r"dataset\.labels=none reads only the images"):
            open_at(source)
        reader = open_at(source, labels="none")
        assert (len(reader), reader.labels, list(reader.notes)) == (2, None, [])


def test_a_test_split_without_labels_has_none_and_a_note(tmp_path):
    for name, labels in (("train", [0, 1]), ("test", [-1, -1])):
        table = pyarrow.table({"image": [PNG, PNG], "label": labels})
        pyarrow.parquet.write_table(table, tmp_path / f"{name}-00000-of-00001.parquet")
    test = make(Folder, tmp_path, split="test", resolution=8)
    assert test.classes == 0
    assert list(test.notes) == ["test-00000-of-00001.parquet: every label is -1 or null, so the images have none"]
    assert make(Folder, tmp_path, split="train", resolution=8).classes == 2
    with pytest.raises(UserError, match=r"2 of 4 are -1 or null, such as that of 'test-00000-of-00001\.parquet row"):
        make(Folder, tmp_path, resolution=8)


def test_a_class_without_images_is_noted(tmp_path):
    np.savez(tmp_path / "a.npz", images=pixels(3), labels=np.array([1, 2, 1]))
    dataset = make(Folder, tmp_path / "a.npz", resolution=8)
    assert dataset.classes == 3
    note = "class 0 has no image, of 3 classes: conditional=true samples all classes equally often"
    assert list(dataset.notes) == [note]
    np.savez(tmp_path / "b.npz", images=pixels(3), labels=np.eye(5, dtype=int)[[1, 2, 1]])
    dataset = make(Folder, tmp_path / "b.npz", resolution=8)
    assert (dataset.classes, dataset.targets.tolist()) == (5, [1, 2, 1])
    assert dataset.notes[0].startswith("3 classes (0, 3, 4) have no image, of 5 classes")


def test_parquet_files_that_differ(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"image": [PNG], "label": [0]}), tmp_path / "a.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"image": [PNG]}), tmp_path / "b.parquet")
    with pytest.raises(UserError, match=r"b\.parquet has no column label, but a\.parquet has"):
        open_at(tmp_path)
    assert len(open_at(tmp_path, labels="none")) == 2
    for name, classes in (("a", ["cat", "dog"]), ("b", ["dog", "cat"])):
        told = {"huggingface": json.dumps({"info": {"features": {"label": {"names": classes}}}})}
        table = pyarrow.table({"image": [PNG], "label": [0]}).replace_schema_metadata(told)
        pyarrow.parquet.write_table(table, tmp_path / f"{name}.parquet")
    with pytest.raises(UserError, match="have different class names"):
        open_at(tmp_path)


def test_ignored_columns_are_noted(tmp_path):
    table = pyarrow.table({"img": [PNG, PNG], "coarse_label": [0, 1], "fine_label": [3, 4], "url": ["a", "b"]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    reader = open_at(tmp_path / "a.parquet")
    assert reader.labels.tolist() == [3, 4]
    assert reader.notes == ["ignored columns: coarse_label, url (used: img, fine_label)"]


# --- captions --------------------------------------------------------------------------------------------------------


def test_a_missing_caption_is_the_empty_text_and_not_the_word_none(tmp_path):
    table = pyarrow.table({"image": [PNG] * 3, "text": ["a", None, ""]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    rows = [{"file_name": f"{k}.png", "text": text} for k, text in enumerate(["a", None, ""])]
    folder = write_folder(tmp_path / "b", images("0.png", "1.png", "2.png") | {"metadata.jsonl": lines(*rows)})
    for path, name in ((tmp_path / "a.parquet", "a.parquet"), (folder, "metadata.jsonl")):
        reader = open_at(path)
        assert reader.captions == ["a", "", ""]
        assert reader.notes == [f"{name}: 2 of 3 images have no caption: the empty text is used"]


def test_the_first_of_several_captions_is_used_and_changes_the_hash(tmp_path):
    def dataset(*texts):
        table = pyarrow.table({"image": [PNG] * 2, "text": texts})
        pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
        return make(Folder, tmp_path / "a.parquet", resolution=8)

    several = dataset(["a", "b"], ["c"])
    assert list(several.prompts) == ["a", "c"]
    assert several.notes == ["a.parquet: 1 of 2 images have several captions: the first is used"]
    one = dataset("a", "c")
    assert list(one.prompts) == ["a", "c"] and one.notes == []
    assert one.sha256 != several.sha256
    rows = [{"file_name": "0.png", "text": text} for text in ("a", "b")]  # a row for each caption
    folder = write_folder(tmp_path / "b", images("0.png") | {"metadata.jsonl": lines(*rows)})
    assert open_at(folder).captions == ["a"]
    texts = ["a", ["b", "c"], [None, "d"], [], None]  # lists in a row, beside texts
    table = lines(*({"file_name": f"{k}.png", "text": text} for k, text in enumerate(texts)))
    folder = write_folder(tmp_path / "c", images(*(f"{k}.png" for k in range(5))) | {"metadata.jsonl": table})
    assert open_at(folder).captions == ["a", "b", "d", "", ""]
    assert any("1 of 5 images have several captions" in note for note in open_at(folder).notes)


def test_without_any_caption_there_are_none(tmp_path):
    table = pyarrow.table({"image": [PNG], "text": pyarrow.array([None], pyarrow.string())})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert open_at(tmp_path / "a.parquet").captions is None
    with pytest.raises(UserError, match="labels=captions: no captions in"):
        open_at(tmp_path / "a.parquet", labels="captions")


def test_a_caption_that_is_not_text_is_refused(tmp_path):
    rows = {"file_name": "0.png", "text": {"raw": "a"}}
    write_folder(tmp_path, images("0.png") | {"metadata.jsonl": lines(rows)})
    with pytest.raises(UserError, match="a caption must be a text or a list of texts"):
        open_at(tmp_path)


def test_lines_end_at_newlines_only(tmp_path):
    texts = ["a\u2028b", "a\u0085b", "a\u2029b\x0bc\x0cd\x1ce"]
    rows = [{"file_name": f"{k}.png", "text": text} for k, text in enumerate(texts)]
    whole = lines(*rows).replace("\n", "\r\n")
    write_folder(tmp_path, images("0.png", "1.png", "2.png") | {"metadata.jsonl": whole})
    assert open_at(tmp_path).captions == texts


@pytest.mark.parametrize("of_files", ["NFC", "NFD"])
@pytest.mark.parametrize("of_names", ["NFC", "NFD"])
@pytest.mark.parametrize("pack", [write_folder, write_zip])
def test_names_are_matched_in_every_unicode_normalisation(tmp_path, pack, of_files, of_names):
    there, named = (unicodedata.normalize(form, "café.png") for form in (of_files, of_names))
    path = pack(tmp_path / "a", images(there) | {"metadata.jsonl": lines({"file_name": named, "text": "a cup"})})
    assert open_at(path).captions == ["a cup"]
    text = named.replace("png", "txt")
    assert open_at(pack(tmp_path / "b", images(there) | {text: "a cup"})).captions == ["a cup"]
    folder = tmp_path / unicodedata.normalize(of_files, "é")
    assert (
        len(
            open_at(
                str(write_folder(folder, images("0.png"))).replace(folder.name, unicodedata.normalize(of_names, "é"))
            )
        )
        == 1
    )


def test_classes_whose_names_differ_in_normalisation_are_one(tmp_path):
    names = [f"{unicodedata.normalize(form, 'é')}/{form}.png" for form in ("NFC", "NFD")]
    reader = open_at(write_folder(tmp_path, images(*names, "f/1.png")), labels="folders")
    assert sorted(reader.labels.tolist()) == [0, 0, 1]


# --- where annotations lie -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pack", [write_folder, write_zip])
@pytest.mark.parametrize("split", ["train", "test", "all"])
def test_metadata_in_the_folder_of_each_split(tmp_path, pack, split):
    """The hub's own layout."""
    files = images("train/0.png", "train/sub/1.png", "test/0.png")
    told = [{"file_name": "0.png", "text": "a"}, {"file_name": "sub/1.png", "text": "b"}]
    captions = files | {"train/metadata.jsonl": lines(*told)}
    captions |= {"test/metadata.jsonl": lines({"file_name": "0.png", "text": "c"})}
    wanted = {"train": ["a", "b"], "test": ["c"], "all": ["c", "a", "b"]}[split]
    assert open_at(pack(tmp_path / "a", captions), split=split).captions == wanted
    labels = files | {"train/dataset.json": json.dumps({"labels": [["0.png", 0], ["sub/1.png", 1]]})}
    labels |= {"test/dataset.json": json.dumps({"labels": [["0.png", 2]]})}
    wanted = {"train": [0, 1], "test": [2], "all": [2, 0, 1]}[split]
    assert open_at(pack(tmp_path / "b", labels), split=split).labels.tolist() == wanted
    whole = files | {"metadata.csv": "file_name,text\ntrain/0.png,a\ntrain/sub/1.png,b\ntest/0.png,c\n"}
    wanted = {"train": ["a", "b"], "test": ["c"], "all": ["c", "a", "b"]}[split]
    assert open_at(pack(tmp_path / "c", whole), split=split).captions == wanted


def test_a_split_without_the_metadata_that_another_has(tmp_path):
    files = images("train/0.png", "test/0.png") | {"train/metadata.jsonl": lines({"file_name": "0.png", "text": "a"})}
    write_folder(tmp_path, files)
    assert open_at(tmp_path, split="train").captions == ["a"]
    assert open_at(tmp_path, split="test").captions is None
    with pytest.raises(UserError, match=r"'test/0\.png' has no metadata\.jsonl .*\(train/metadata\.jsonl\)"):
        open_at(tmp_path)
    assert len(open_at(tmp_path, labels="none")) == 2


@pytest.mark.parametrize("pack", [write_folder, write_zip])
def test_every_kind_of_metadata(tmp_path, pack):
    rows = [{"file_name": "1.png", "text": "b, with\na line"}, {"file_name": "0.png", "text": "a"}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "m.parquet")
    every = {
        "metadata.jsonl": lines(*rows),
        "metadata.csv": '\ufefffile_name,text\r\n1.png,"b, with\na line"\r\n0.png,a\r\n',
        "metadata.parquet": (tmp_path / "m.parquet").read_bytes(),
    }
    for name, data in every.items():
        path = pack(tmp_path / name, images("0.png", "1.png") | {name: data})
        assert open_at(path).captions == ["a", "b, with\na line"]


def test_labels_in_metadata_come_before_captions_as_everywhere(tmp_path):
    rows = [{"file_name": f"{k}.png", "label": name, "text": f"a {name}"} for k, name in enumerate(["dog", "cat"])]
    write_folder(tmp_path, images("0.png", "1.png") | {"metadata.jsonl": lines(*rows)})
    reader = open_at(tmp_path)
    assert (reader.labels.tolist(), reader.class_names, reader.captions) == ([1, 0], ["cat", "dog"], None)
    assert any("captions of metadata.jsonl are ignored" in note for note in reader.notes)
    assert open_at(tmp_path, labels="captions").captions == ["a dog", "a cat"]


def test_ignored_tables_and_captions_are_noted(tmp_path):
    table = {"metadata.jsonl": lines({"file_name": "0.png", "text": "a"}), "metadata.csv": "file_name,text\n0.png,b\n"}
    reader = open_at(write_folder(tmp_path / "a", images("0.png") | table))
    assert reader.captions == ["a"]
    assert reader.notes == ["metadata.csv is ignored because 'metadata.jsonl' lies beside it"]
    both = images("0.png", "1.png") | {"0.cls": "0", "1.cls": "1", "0.txt": "a", "1.txt": "b"}
    reader = open_at(folder := write_folder(tmp_path / "b", both))
    assert (reader.labels.tolist(), reader.captions) == ([0, 1], None)
    assert reader.notes == [
        "2 captions beside images (.txt) are ignored because there are labels: dataset.labels=captions uses them"
    ]
    assert open_at(folder, labels="captions").captions == ["a", "b"]
    assert open_at(folder, labels="captions").notes == []


@pytest.mark.parametrize("pack", [write_folder, write_zip])
def test_names_in_tables_as_windows_writes_them(tmp_path, pack):
    pairs = [["train\\cat\\0.png", 1], [".\\train\\cat\\1.png", 0]]
    files = images("train/cat/0.png", "train/cat/1.png") | {"dataset.json": json.dumps({"labels": pairs})}
    assert open_at(pack(tmp_path / "a", files)).labels.tolist() == [1, 0]
    rows = [{"file_name": ".//a\\0.png", "text": "a"}]
    assert open_at(pack(tmp_path / "b", images("a/0.png") | {"metadata.jsonl": lines(*rows)})).captions == ["a"]


def test_an_image_with_two_labels_is_refused_and_a_label_twice_is_not(tmp_path):
    for second, message in ((1, None), (2, "dataset.json has several labels for '0.png'")):
        told = {"labels": [["0.png", 1], ["0.png", second]]}
        write_folder(tmp_path, images("0.png") | {"dataset.json": json.dumps(told)})
        if message is None:
            assert open_at(tmp_path).labels.tolist() == [1]
        else:
            with pytest.raises(UserError, match=message):
                open_at(tmp_path)


def test_labels_of_webdataset(tmp_path):
    reader = open_at(write_folder(tmp_path, images("0.png", "1.png") | {"0.cls": "3", "1.cls": "5"}))
    assert (reader.labels.tolist(), reader.notes) == ([3, 5], [])
