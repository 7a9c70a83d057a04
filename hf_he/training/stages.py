"""Stages of a training pipeline: each has a folder with `stage.json`, and is not run again as long as its settings have not changed."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import PartialState

from hf_he.errors import DataError
from hf_he.serialization import write_file

MARKER = "stage.json"


def refuse_other_run(root: Path, **run: Any) -> None:
    """Raise DataError where `root` holds stages of a full run (without max_steps) that differ in a setting of `run`, and would be emptied."""
    for marker in sorted(root.rglob(MARKER)):
        settings = _finished(marker.parent)
        if settings is None or settings.get("max_steps", 0) is not None:
            continue
        for name, value in run.items():
            if settings.get(name) != value:
                raise DataError(f"{marker.parent} is finished, of a full run with {name} {settings.get(name)} instead of {value}: give another --output-dir.")


def run_stage(folder: Path, settings: dict[str, Any], work: Callable[[Path], dict[str, Any]], announce: Callable[[], None]) -> None:
    """Unless `folder` holds a finished stage with these settings (JSON values), empty it, call `work` on it, and write settings, work's report
    and seconds to its stage.json. Under `accelerate launch` every process calls this; the main one writes."""
    state = PartialState()
    state.wait_for_everyone()
    if _finished(folder) == settings:
        return
    announce()
    if state.is_main_process:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    state.wait_for_everyone()
    started = time.monotonic()
    report = {"recipe": settings} | work(folder)
    if state.is_main_process:
        report["seconds"] = round(time.monotonic() - started, 1)
        write_file(folder / MARKER, json.dumps(report, indent=1).encode())
    state.wait_for_everyone()


def stage_report(folder: Path) -> dict[str, Any]:
    """The stage.json of a finished stage."""
    return json.loads((folder / MARKER).read_text(encoding="utf-8"))


def stage_digest(folder: Path) -> str:
    """SHA-256 of the settings a finished stage ran with: part of the settings of the stage after it."""
    return digest(stage_report(folder)["recipe"])


def digest(value: Any) -> str:
    """SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _finished(folder: Path) -> dict[str, Any] | None:
    """The settings in `folder`'s stage.json, None where it is missing or damaged."""
    try:
        return stage_report(folder)["recipe"]
    except (OSError, ValueError):
        return None
