"""kill -9 of the server or the client process at random moments of a run: it always resumes, and ends with the adapter of a run left alone.

HF_HE_CRASHES (default 2) is the number of kills, HF_HE_CRASH_SEED draws them. Encryption noise differs from run to run, so that every run, killed or
left alone, is compared with the noise-free plaintext twin: 34 runs left alone are 3.7e-5 to 6.1e-5 away, the twin without its last and smallest step 1.2e-3.
"""

import os
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file
from tiny_run import DATA, OPTIONS

CRASHES = int(os.environ.get("HF_HE_CRASHES", "2"))
SEED = int(os.environ.get("HF_HE_CRASH_SEED", "0"))
STEPS = 4
BOUND = 8e-5
PROGRAM = """
import sys, warnings
warnings.simplefilter("ignore")
from hf_he.data import TextDataset
from hf_he.finetuning.arguments import EncryptedTrainingArguments
from hf_he.finetuning.report import twin_run
from hf_he.finetuning.trainer import EncryptedTrainer
from transformers import TrainerCallback
model, folder, texts, labels, options, twins = sys.argv[1], sys.argv[2], *map(eval, sys.argv[3:])

class Say(TrainerCallback):
    def on_train_begin(self, args, state, control, **kwargs):
        print("begin", state.global_step, flush=True)

    def on_step_end(self, args, state, control, **kwargs):
        print("step", state.global_step, flush=True)

trainer = EncryptedTrainer(
    model, EncryptedTrainingArguments(folder, **options), TextDataset("mr", "train", texts, None, labels), callbacks=[Say()],
    announce=lambda text: print(text, flush=True),
)
trainer.train(resume_from_checkpoint=(trainer.folder / "client" / "run.json").is_file())
trainer.save_model()
run = trainer.training
for steps, place in twins.items():
    twin = twin_run(trainer.model_folder, run.client.tokenizer, trainer.train_dataset, run.settings, trainer.step_rows, steps, trainer.args.seed)
    twin.model.save_pretrained(place)
"""


class Run:
    """A client process with its server process, until it ends or is killed."""

    def __init__(self, model: Path, folder: Path, twins: dict[int, str] | None = None) -> None:
        arguments = DATA.first, DATA.labels, {**OPTIONS, "max_steps": STEPS}, twins or {}
        command = [sys.executable, "-c", PROGRAM, str(model), str(folder), *map(repr, arguments)]
        self.log = folder.with_suffix(".log")
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        self.begin, self.end, self.first, self.step = 0.0, 0.0, 0, 0
        self.starting, self.begun = threading.Event(), threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self.process.stdout:
            word, _, number = line.strip().partition(" ")
            if word == "Starting":
                self.starting.set()
            elif word == "begin":
                self.begin, self.first = time.monotonic(), int(number)
                self.step = self.first
                self.begun.set()
            elif word == "step":
                self.end, self.step = time.monotonic(), int(number)
        self.starting.set()
        self.begun.set()

    def kill(self, server: bool) -> None:
        """-9, to the client or to its server; the other one then ends by itself."""
        victims = psutil.Process(self.process.pid).children() if server else [psutil.Process(self.process.pid)]
        for victim in victims:
            victim.kill()

    def wait(self) -> int:
        code = self.process.wait(900)
        self._reader.join(10)
        return code

    @property
    def pace(self) -> float:
        """Seconds per step of this process."""
        return (self.end - self.begin) / max(self.step - self.first, 1)

    def errors(self) -> str:
        return self.log.read_text(errors="replace")[-2000:]


def difference(a: Path, b: Path) -> float:
    """|b - a| / |a| of two folders of a PEFT adapter."""
    expected, found = (load_file(folder / "adapter_model.safetensors") for folder in (a, b))
    assert expected.keys() == found.keys()
    gap = torch.cat([(expected[name] - found[name]).flatten() for name in expected]).norm()
    return float(gap / torch.cat([values.flatten() for values in expected.values()]).norm())


@pytest.mark.slow
def test_killed_at_random_moments_it_resumes_and_ends_the_same(tiny, tmp_path):
    twins = {steps: str(tmp_path / f"twin-{steps}") for steps in (STEPS, STEPS - 1)}
    alone = Run(tiny, tmp_path / "alone", twins)
    assert alone.wait() == 0, alone.errors()
    expected, lost = map(Path, twins.values())
    pace, rng, kills, ended, number = alone.pace, random.Random(SEED), Counter(), [], 0
    while kills.total() < CRASHES:
        folder = tmp_path / f"crashed-{number}"
        run, early, server = Run(tiny, folder), rng.random() < 0.2, rng.random() < 0.6
        (run.starting if early else run.begun).wait(600)
        time.sleep(rng.random() * (2.0 if early else pace * max(STEPS - run.step, 1)))
        if run.process.poll() is None and run.step < STEPS:
            run.kill(server)
            kills["server" if server else "client"] += 1
            assert run.wait() != 0
        else:
            assert run.wait() == 0, run.errors()
            pace = run.pace if run.step > run.first else pace
            ended.append(folder)
            number += 1
    run = Run(tiny, folder if folder not in ended else tmp_path / "crashed-last")
    assert run.wait() == 0, run.errors()
    noise, *differences = [difference(expected, path / "adapter") for path in (tmp_path / "alone", *{*ended, folder})]
    print(f"killed {dict(kills)}, {len(differences)} runs: relative differences up to {max(differences):.1e}; left alone {noise:.1e}")
    assert max(noise, *differences) < BOUND
    assert difference(expected, lost) > 1e-3
