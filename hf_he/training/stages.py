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

MARKER = "stage.json"


def run_stage(folder: Path, settings: dict[str, Any], work: Callable[[Path], dict[str, Any]], announce: Callable[[], None]) -> None:
    """Unless `folder` holds a finished stage with these settings (JSON values), empty it, call `work` on it, and write settings, work's report
    and seconds to its stage.json. Under `accelerate launch` every process calls this; the main one writes."""
    state, marker = PartialState(), folder / MARKER
    state.wait_for_everyone()
    if marker.is_file() and stage_report(folder)["recipe"] == settings:
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
        marker.write_text(json.dumps(report, indent=1), encoding="utf-8")
    state.wait_for_everyone()


def stage_report(folder: Path) -> dict[str, Any]:
    """The stage.json of a finished stage."""
    return json.loads((folder / MARKER).read_text(encoding="utf-8"))


def stage_digest(folder: Path) -> str:
    """SHA-256 of the settings a finished stage ran with: part of the settings of the stage after it."""
    return hashlib.sha256(json.dumps(stage_report(folder)["recipe"], sort_keys=True).encode()).hexdigest()
