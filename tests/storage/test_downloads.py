"""Sources: what is known of them, their download from the hub and by URL, and the record that later ones must match."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import tomllib
from collections import namedtuple
from pathlib import Path

import pytest

from distillbench.errors import UserError
from distillbench.storage import downloads, sources
from distillbench.storage.downloads import adopt, by_hand, fetch, located, offered, read_record
from distillbench.storage.source_messages import missing_teacher
from distillbench.storage.sources import HUB_DATASET, URL, Source, SourceFile, known, of_dataset, of_teacher
from distillbench.system.progress import Progress
from file_server import COMMIT, serving
from recorded_progress import RecordingProgress

SILENT = Progress(None)
DATA = bytes(range(256)) * 40
REPOSITORY = "owner/faces"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv(downloads.VARIABLE, str(tmp_path / "downloads"))
    return tmp_path / "downloads"


@pytest.fixture
def server(folder, monkeypatch):
    """A server of files that is also the hub."""
    from huggingface_hub import constants, file_download

    monkeypatch.setattr(file_download.time, "sleep", lambda seconds: None)  # its pause before it tries again
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # what it resumes by
    with serving() as files:
        monkeypatch.setattr(constants, "ENDPOINT", files.url)
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace("https://huggingface.co", files.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        files.files["/net.pkl"] = DATA
        files.repositories[REPOSITORY] = {"faces.zip": DATA, "data/a.parquet": b"a", "data/b.parquet": b"bb"}
        yield files


def at_hub(*patterns: str, part: str = "dataset", **settings: object) -> Source:
    parts = ("faces", part, "ffhq", "Faces", "CC0", "a mirror", HUB_DATASET)
    return Source(*parts, repository=REPOSITORY, patterns=patterns or ("faces.zip",), **settings)


def by_url(server, sha256: str | None = None, size: int | None = None) -> Source:
    file = SourceFile(f"{server.url}/net.pkl", size, sha256)
    return Source("net", "teacher", "edm", "Net", "CC0", "an institute", URL, files=(file,))


def get(source: Source) -> Path:
    return fetch(offered(source), SILENT)


def below(folder: Path) -> list[str]:
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in names if not name.endswith(".claim") and "/.cache/" not in name)


# --- the entries -----------------------------------------------------------------------------------------------------


def test_every_entry_says_what_a_user_needs_and_hashes_are_whole():
    for source in known().values():
        assert source.licence and source.title and source.publisher and source.part in ("dataset", "teacher")
        assert source.kind in (HUB_DATASET, URL)
        assert bool(source.repository and source.patterns) == (source.kind == HUB_DATASET) == (not source.files)
        assert all(file.sha256 is None or len(bytes.fromhex(file.sha256)) == 32 for file in source.files)
        assert all(file.url.startswith("https://") for file in source.files)
        if source.part == "dataset":
            assert source.example and source.by_hand
    assert known()["ffhq"].images == 70_000 and "CC BY-NC-SA 4.0" in known()["ffhq"].licence
    mirrors = [source for source in known().values() if source.kind == HUB_DATASET]
    assert all("third party's mirror" in source.publisher for source in mirrors)


def test_a_dataset_names_the_teacher_that_fits_it():
    named = [source for source in known().values() if source.teacher]
    assert {source.name for source in named} == {"cifar10", "ffhq", "imagenet64", "imagenet64-test"}
    for source in named:
        teacher = known()[source.teacher]
        assert of_teacher(source.plugin, teacher.settings["resolution"], teacher.settings["conditional"]) == teacher
        assert str(source.settings.get("resolution", 32)) in teacher.name


@pytest.mark.parametrize("name, given, found", [
    ("ffhq", {}, "ffhq"),
    ("ffhq", {"resolution": 64, "split": "train"}, "ffhq"),
    ("ffhq", {"resolution": "256"}, "ffhq-256"),
    ("ffhq", {"resolution": 128}, None),
    ("imagenet64", {"split": "test"}, "imagenet64-test"),
    ("digits", {}, None),
])  # fmt: skip
def test_the_settings_of_a_dataset_choose_its_download(name, given, found):
    source = of_dataset(name, given)
    assert (source and source.name) == found


def test_a_teacher_is_chosen_by_its_dataset_or_by_name():
    assert of_teacher("cifar10", 32, False).files[0].name == "edm-cifar10-32x32-uncond-vp.pkl"
    assert of_teacher("cifar10", 32, True).files[0].name == "edm-cifar10-32x32-cond-vp.pkl"
    assert of_teacher("ffhq", 256, False) is None and of_teacher("ffhq", 64, False, "diffusers") is None
    assert of_teacher("folder", 7, True, "edm", "edm-ffhq-64-ve").files[0].name == "edm-ffhq-64x64-uncond-ve.pkl"
    with pytest.raises(UserError, match=r"no released teacher 'edm-ffhq-46' in teacher\.release\. Did you mean"):
        of_teacher("ffhq", 64, False, "edm", "edm-ffhq-46")


def test_a_file_of_own_entries_replaces_those_of_the_same_name(tmp_path, monkeypatch):
    entry = tomllib.loads(sources.FILE.read_text())["edm-ffhq-64"]
    lines = [f"{name} = {json.dumps(value)}" for name, value in entry.items() if isinstance(value, str)]
    own = tmp_path / "own.toml"
    own.write_text("\n".join(["[edm-ffhq-64]", *lines, 'files = [{url = "https://here/net.pkl"}]']))
    monkeypatch.setenv(sources.VARIABLE, str(own))
    assert known()["edm-ffhq-64"].origin == "https://here/net.pkl" and "ffhq" in known()
    for text, words in (("[x]\n", "entry 'x' .*: part: Field req"), ("=", "cannot read"), ("x = 1", "entry 'x'")):
        own.write_text(text)
        with pytest.raises(UserError, match=words):
            known()
    own.write_text("\n".join(["[a]", *lines, 'files = [{url = "https://here/net.pkl", sha265 = "1"}]']))
    with pytest.raises(UserError, match=r"entry 'a' .*: files\.0\.sha265: Unexpected keyword argument"):
        known()
    own.write_text("\n".join(["[a]", *lines]).replace('"url"', '"ftp"'))
    with pytest.raises(UserError, match=r"no kind of source 'ftp' \(a in own\.toml\)"):
        known()
    monkeypatch.setenv(sources.VARIABLE, str(tmp_path / "none.toml"))
    with pytest.raises(UserError, match=r"cannot read .*none\.toml"):
        known()


@pytest.mark.parametrize("entry, why", [
    ('kind = "url"', "kind 'url' needs files"),
    ('kind = "hub dataset"\nrepository = "a/b"', "kind 'hub dataset' needs repository and patterns"),
    ('kind = "url"\nfiles = [{url = "https://a/x.pkl"}, {url = "https://b/x.pkl"}]', "the same name: x.pkl, x.pkl"),
    ('kind = "url"\nfiles = [{url = "https://a/.."}]', "'..' cannot be the name of a file or folder"),
    ('kind = "url"\nfiles = [{url = "https://a/"}]', "'' cannot be the name"),
])  # fmt: skip
def test_an_entry_without_files_of_its_own_is_refused(tmp_path, entry, why):
    words = "\n".join(f'{name} = "x"' for name in ("part", "plugin", "title", "licence", "publisher"))
    (tmp_path / "own.toml").write_text(f"[a]\n{words}\n{entry}")
    with pytest.raises(UserError, match=f"entry 'a' .*cannot be used: .*{why}"):
        sources.read_sources(tmp_path / "own.toml")
    (tmp_path / "own.toml").write_text(f'["../a"]\n{words}\nkind = "url"\nfiles = [{{url = "https://a/x.pkl"}}]')
    with pytest.raises(UserError, match=r"'\.\./a' cannot be the name of a file or folder"):
        sources.read_sources(tmp_path / "own.toml")


def test_a_teacher_of_the_hub_has_a_message_like_others(folder):
    source = at_hub("nets/x.pkl", part="teacher")
    assert "teacher.path=FOLDER/nets/x.pkl" in missing_teacher(source)


# --- by URL ----------------------------------------------------------------------------------------------------------


def test_a_file_is_downloaded_once_recorded_and_found(server, folder):
    source = by_url(server)
    assert located(source) is None and offered(source).bytes == len(DATA)
    path = get(source)
    assert path == located(source) == folder / "net" / "net.pkl" and path.read_bytes() == DATA
    assert read_record(source).files == {"net.pkl": (len(DATA), sha256(DATA))}
    server.asked.clear()
    offer = offered(by_url(server, size=len(DATA)))
    assert fetch(offer, SILENT) == path and not server.asked  # found, and its hash is right


def test_the_first_hash_is_trusted_and_later_files_must_have_it(server, folder):
    source = by_url(server)
    get(source).unlink()
    assert located(source) is None
    server.files["/net.pkl"] = DATA[::-1]
    with pytest.raises(UserError, match=f"its sha256 is {sha256(DATA[::-1])}, not {sha256(DATA)}. It was set aside"):
        get(source)
    assert below(folder) == ["net.json", "net/net.pkl.refused"] and located(source) is None
    (folder / "net.json").unlink()  # the user trusts the new file
    assert get(source).read_bytes() == DATA[::-1]


def test_a_published_hash_holds_from_the_first_download(server, folder):
    with pytest.raises(UserError, match="is not the file that was expected"):
        get(by_url(server, sha256(b"other")))
    assert below(folder) == ["net/net.pkl.refused"]
    assert get(by_url(server, sha256(DATA))).read_bytes() == DATA


def test_a_published_size_holds(server):
    with pytest.raises(UserError, match=r"it is of 10,240 bytes, not of 9 bytes\. It was set aside"):
        get(by_url(server, size=9))


def test_a_file_that_was_changed_on_this_disk_is_replaced(server, folder):
    source = by_url(server)
    path = get(source)
    path.write_bytes(DATA[::-1])
    assert located(source) == path  # as long as before
    assert get(source).read_bytes() == DATA
    path.write_bytes(b"shorter")
    assert located(source) is None and get(source).read_bytes() == DATA


@pytest.mark.parametrize("damage", [b"", b"[]", b"{}", b'{"format": 1}', b"\xff"])
def test_a_damaged_record_counts_as_none(server, folder, damage):
    source = by_url(server)
    get(source)
    (folder / "net.json").write_bytes(damage)
    assert located(source) is None
    assert get(source) == located(source)


def test_no_server_says_how_to_do_it_by_hand(server, folder):
    source = by_url(server)
    del server.files["/net.pkl"]
    with pytest.raises(UserError) as caught:
        offered(source)
    first, kept, hand = str(caught.value).splitlines()
    assert first == f"cannot download {server.url}/net.pkl: the server answers 404 Not Found"
    assert kept.strip() == "nothing was downloaded"
    assert f"curl -LO {server.url}/net.pkl" in hand and "distillbench fetch net --from FOLDER" in hand


def test_space_is_checked_before_the_first_byte(server, folder, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(0, 0, 2**26 + 4_000))
    offer = offered(by_url(server))
    server.asked.clear()
    with pytest.raises(UserError, match="no space for net"):
        fetch(offer, SILENT)
    assert not server.asked
    (folder / "net").mkdir(exist_ok=True)
    (folder / "net" / "net.pkl.part").write_bytes(DATA[:8_000])  # the rest has room
    (folder / "net" / "net.pkl.part.etag").write_text(f'"{sha256(DATA)}"')
    assert fetch(offer, SILENT).read_bytes() == DATA and server.gets == ["bytes=8000-"]


def _get(folder: str, url: str) -> None:
    import os

    os.environ[downloads.VARIABLE] = folder
    get(Source("net", "teacher", "edm", "Net", "CC0", "x", URL, files=(SourceFile(f"{url}/net.pkl", len(DATA)),)))


def test_two_processes_download_it_once(server, folder):
    processes = [multiprocessing.get_context("fork").Process(target=_get, args=(str(folder), server.url)) for _ in "ab"]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0] and server.gets == [""]


# --- from the hub ----------------------------------------------------------------------------------------------------


def test_the_file_of_a_hub_dataset_is_downloaded_at_the_commit_that_is_recorded(server, folder):
    source = at_hub()
    offer = offered(source)
    assert (offer.commit, offer.bytes, [file.name for file in offer.files]) == (COMMIT, len(DATA), ["faces.zip"])
    path = fetch(offer, SILENT)
    assert path == located(source) == folder / "faces" / "faces.zip" and path.read_bytes() == DATA
    assert read_record(source).commit == COMMIT and below(folder) == ["faces.json", "faces/faces.zip"]
    server.asked.clear()
    assert fetch(offer, SILENT) == path and not server.asked


def test_several_files_are_a_folder(server, folder):
    source = at_hub("data/*.parquet")
    assert get(source) == located(source) == folder / "faces"
    assert below(folder) == ["faces.json", "faces/data/a.parquet", "faces/data/b.parquet"]
    with pytest.raises(UserError, match=r"owner/faces on the hub has no file none\.zip"):
        offered(at_hub("none.zip"))


def test_later_downloads_ask_for_the_recorded_commit(server, folder):
    source = at_hub()
    get(source).unlink()
    server.asked.clear()
    get(source)
    assert server.asked[0][1] == f"/api/datasets/{REPOSITORY}/revision/{COMMIT}"
    server.commit = "d" * 40
    located(source).unlink()
    with pytest.raises(UserError, match="cannot get owner/faces from the hub"):  # it is gone there
        get(source)


def test_a_cut_connection_to_the_hub_is_resumed(server, folder):
    offer = offered(at_hub())
    server.cuts = [3000]
    assert fetch(offer, SILENT).read_bytes() == DATA
    assert "bytes=3000-" in server.gets


def test_bytes_that_the_hub_did_not_announce_are_set_aside(server, folder):
    offer = offered(at_hub())
    server.repositories[REPOSITORY]["faces.zip"] = DATA[::-1]
    with pytest.raises(UserError, match=f"it is {sha256(DATA[::-1])}, not {sha256(DATA)}, as the hub says. It was se"):
        fetch(offer, SILENT)
    assert below(folder) == ["faces/faces.zip.refused"] and located(at_hub()) is None


def test_no_hub_says_how_to_do_it_by_hand(server, folder, monkeypatch):
    server.repositories.clear()
    with pytest.raises(UserError) as caught:
        offered(at_hub())
    message = str(caught.value)
    assert message.startswith("cannot get owner/faces from the hub: ")
    command = "hf download owner/faces --repo-type dataset --include 'faces.zip' --local-dir FOLDER"
    assert command in message and command == by_hand(at_hub())
    assert "distillbench fetch faces --from FOLDER" in message and "HF_ENDPOINT=https://... (now http" in message


def test_a_name_that_points_outside_the_folder_is_refused(server, folder):
    server.repositories[REPOSITORY] = {"../faces.zip": DATA}
    with pytest.raises(UserError, match=r"has a file '\.\./faces\.zip', which points outside"):
        offered(at_hub("*.zip"))


# --- by hand ---------------------------------------------------------------------------------------------------------


def test_files_that_were_downloaded_by_hand_are_checked_like_others(server, folder, tmp_path):
    source, given = at_hub("data/*.parquet"), tmp_path / "given"
    (given / "data").mkdir(parents=True)
    with pytest.raises(UserError, match=r"--from: no file data/\*\.parquet in .*given', which faces is made of"):
        adopt(source, given, SILENT)
    (given / "data" / "a.parquet").write_bytes(b"a")
    assert adopt(source, given, SILENT) == folder / "faces" / "data" / "a.parquet"
    (given / "net.pkl").write_bytes(b"wrong")
    net = by_url(server, sha256(DATA))
    with pytest.raises(UserError, match=rf"is not net: its sha256 is .*, not {sha256(DATA)}"):
        adopt(net, given, SILENT)
    (given / "net.pkl").write_bytes(DATA)
    assert adopt(net, given / "net.pkl", SILENT) == located(net) and (given / "net.pkl").exists()


def test_another_process_is_waited_for(server, folder):
    progress = RecordingProgress()
    source = by_url(server)
    from filelock import FileLock

    folder.mkdir()
    lock = FileLock(folder / ".net.claim", thread_local=False)
    lock.acquire()
    progress.say = lambda line: (progress.lines.append(line), lock.release())  # type: ignore[method-assign]
    fetch(offered(source), progress)
    assert progress.lines == ["waiting for net, which another process is making"]


def given_files(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())
    return folder


def test_a_part_of_what_was_downloaded_by_hand_is_refused(server, folder, tmp_path):
    source = at_hub("data/*.parquet")
    given = given_files(tmp_path / "given", "data/train-00000-of-00003.parquet", "data/train-00002-of-00003.parquet")
    with pytest.raises(UserError, match=r"--from: '.*given' lacks data/train-00001-of-00003\.parquet, which faces has"):
        adopt(source, given, SILENT)
    assert located(source) is None and not below(folder)
    given_files(given, "data/train-00001-of-00003.parquet")
    assert adopt(source, given, SILENT) == located(source) == folder / "faces"
    (folder / "faces" / "data" / "train-00000-of-00003.parquet").unlink()
    (given / "net.pkl").write_bytes(DATA[:-1])
    with pytest.raises(UserError, match=r"net\.pkl' is not net: it has 10,239 bytes, not 10,240"):
        adopt(by_url(server, size=len(DATA)), given, SILENT)


def test_files_by_hand_must_be_all_of_those_that_were_there_before(server, folder, tmp_path):
    source = at_hub("data/*.parquet")
    get(source)
    (folder / "faces" / "data" / "b.parquet").unlink()
    given = given_files(tmp_path / "given", "data/a.parquet")
    (given / "data" / "a.parquet").write_bytes(b"a")
    with pytest.raises(UserError, match=r"lacks data/b\.parquet, which faces has"):
        adopt(source, given, SILENT)


@pytest.mark.parametrize("revision", [COMMIT, "main"])
def test_a_revision_of_the_entry_is_found_again_whoever_downloaded_it(server, folder, tmp_path, revision):
    source = at_hub(revision=revision)
    assert get(source) == located(source)
    assert located(at_hub(revision="e" * 40)) is None
    assert f"--revision {revision} --include" in by_hand(source)
    (folder / "faces.json").unlink()
    path = given_files(tmp_path / "given", "faces.zip") / "faces.zip"
    assert adopt(source, path, SILENT) == located(source)


def test_files_of_an_earlier_revision_are_not_read_with_the_new_ones(server, folder):
    get(at_hub("data/*.parquet"))
    server.repositories[REPOSITORY] = {"data/c.parquet": b"c", "data/d.parquet": b"d"}
    progress = RecordingProgress()
    path = fetch(offered(at_hub("data/*.parquet", revision="main")), progress)
    assert sorted(file.name for file in path.rglob("*.parquet")) == ["c.parquet", "d.parquet"]
    assert below(folder / "faces" / "data")[0] == "a.parquet.refused"
    assert "faces does not have the file data/a.parquet: set aside as" in "".join(progress.lines)
