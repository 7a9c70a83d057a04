"""`EncryptedTextTrainer`: a decoder fine-tuned on a private text by a server that sees neither text nor adapter.

    trainer = EncryptedTextTrainer("model_cards/he-gpt-neox-tiny/gaussian_kernel", text, "out/run", steps=10)
    report = trainer.train()

Below the output folder, `client` (mode 0700: keys, settings) belongs to the client and `server` to the server process. Afterwards `encrypted_adapter` is
the adapter as the server left it, for `hf-he serve --generate --adapter`, and `adapter` the decrypted one, a plain PEFT adapter for the client's eyes.
"""

from __future__ import annotations

import copy
import json
import math
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hf_he.checkpoints import load_tokenizer
from hf_he.errors import CheckpointError, CorruptFileError, DataError, ParameterError, RangeError, TrainingError
from hf_he.finetuning.client_folder import RUN_FILE, finished_step, read_run, write_run
from hf_he.finetuning.language_client import LanguageTrainingClient, no_windows
from hf_he.finetuning.language_step import PROJECTIONS, LanguageTwin, adapted_decoder, next_token_loss
from hf_he.finetuning.optimizer import calibrate_divisor
from hf_he.finetuning.order import DataOrder
from hf_he.finetuning.protocol import EncryptedAdapterMessage, RunId, TrainingSettings
from hf_he.finetuning.report import relative_error
from hf_he.generation.adapter import EncryptedLora
from hf_he.generation.client import GenerationClient
from hf_he.generation.model import load_decoder
from hf_he.keys import EVALUATION_FILE, SECRET_FILE
from hf_he.local_server import local_servers
from hf_he.serialization import read_file, write_file

LOSSES_FILE = "losses.json"
CALIBRATION_STEPS = 4


class EncryptedTextTrainer:
    """Fine-tunes LoRA adapters of the decoder in folder `model` on `text`, cut into windows of `context` tokens.

    `batch_size`: windows of a step. `target_modules`: linear layers with an adapter, by default queries, keys and values. `optimizer`, `learning_rate`,
    `schedule`, `momentum`: as in `TrainingSettings`. `server`: a connection to a LanguageFinetuneServer with the keys of `prepare()`; by default one is
    started as a child process. `announce` receives lines about what happens.

    In a folder that holds a run it goes on with that. Raises TrainingError when the arguments are not those the run began with, or it has finished and
    more steps are asked for, CorruptFileError when its files are damaged.
    """

    def __init__(
        self,
        model: str | Path,
        text: str,
        output_dir: str | Path,
        *,
        steps: int = 10,
        rank: int = 2,
        target_modules: Sequence[str] | None = None,
        optimizer: str = "sgd",
        learning_rate: float = 1.0,
        schedule: str = "constant",
        momentum: float = 0.9,
        batch_size: int | None = None,
        context: int = 64,
        backend: str = "auto",
        parameters: str = "n14",
        refresh: str = "client",
        seed: int = 0,
        server: Any = None,
        announce: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.folder, self.refresh, self.seed = Path(output_dir), refresh, seed
        self._directory, self._server, self._announce = Path(model), server, announce
        own = self.folder / "client"
        saved = _read_saved(own, context) if (own / RUN_FILE).is_file() else None
        keys = own / "keys"
        ready = saved is not None and (keys / SECRET_FILE).is_file() and (keys / EVALUATION_FILE).is_file()
        self.client = GenerationClient.from_pretrained(model, backend=backend, parameters=parameters, keys=keys if ready else None, context=context)
        self.tokenizer = load_tokenizer(model)
        self.windows, self.lengths = self._accepted(*text_windows(self.tokenizer(text)["input_ids"], context))
        if batch_size is not None and (not isinstance(batch_size, int) or batch_size < 1):
            raise ParameterError(f"batch_size is a whole number of texts from 1, not {batch_size!r}: leave it out for all lanes")
        size = min(self.client.packing.sequences if batch_size is None else batch_size, len(self.windows))
        self.order = DataOrder(len(self.windows), size, seed)
        self.losses = _read_losses(own / LOSSES_FILE) if (own / LOSSES_FILE).is_file() else []
        draft = TrainingSettings(
            rank=rank,
            target_modules=tuple(target_modules or PROJECTIONS[self.client.model.config.model_type]),
            optimizer=optimizer,
            learning_rate=learning_rate,
            schedule=schedule,
            momentum=momentum,
            steps=steps,
            sequences=size * (context - 1),
            loss_location="client",
        )
        if saved is None:
            settings = self._calibrated(draft)
            saved = {"run": secrets.token_hex(8), "order_key": secrets.token_hex(32), "settings": asdict(settings), "context": context}
        else:
            settings = TrainingSettings.from_bytes(json.dumps(saved["settings"]).encode())
            self._check_settings(draft, settings)
        digest = self.order.digest(bytes.fromhex(saved["order_key"]), [json.dumps(window.tolist()) for window in self.windows], self.lengths.tolist())
        self.training = LanguageTrainingClient(self.client, settings, RunId(saved["run"], digest), seed)
        self.reports: list[dict[str, Any]] = []
        self._saved, self._ready = saved, ready

    @property
    def settings(self) -> TrainingSettings:
        return self.training.settings

    def prepare(self) -> Path:
        """Keys and settings on the disk, where there are none; the evaluation-key file, which a server is started with.

        Raises RangeError when training in the clear leaves a fitted range, which nothing would notice on the server.
        """
        own = self.folder / "client"
        if not self._ready:
            self._keep_ranges()
            for folder in (self.folder, own):
                folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._announce("Generating keys")
            keys = self.training.keygen()
            keys.save(own / "keys", bootstrapping=self.refresh == "bootstrap")
            self.client.use_keys(replace(keys, evaluation=None))
            write_run(own, self._saved)
            self._ready = True
        return own / "keys" / EVALUATION_FILE

    def train(self) -> dict[str, Any]:
        """Train to the end of the schedule, from the last step the server has on its disk. Returns the report.

        Raises TrainingError when server and client hold different runs, CheckpointError when they are not at the same step, RangeError when values left
        their range, and what the server reports.
        """
        self.prepare()
        with self._connected() as server:
            self._align(server)
            for step in range(len(self.losses) + 1, self.settings.steps + 1):
                self._step(server, step)
            message = server.infer(self.training.request(), self.training.text_answers(0, *no_windows(self.client.packing.tokens)))
        return self._finish(message)

    def _align(self, server: Any) -> None:
        """Bring both halves to the same step: the last one that the server has on its disk."""
        training, done = server.describe().get("training", {}), len(self.losses)
        step = training.get("step", -1)
        if step < 0:
            if done:
                raise CheckpointError(f"the server's folder is empty, this client is at step {done}: give the server the folder of this run")
            server.infer(self.training.setup(), self.training.text_answers(0, *no_windows(self.client.packing.tokens)))
            return
        self.training.run.check(RunId(training.get("run", ""), training.get("order", "")))
        if abs(step - done) > 1:
            raise CheckpointError(f"the server is at step {step}, this client at {done}: their folders belong to different runs")
        if step < done:
            self._announce(f"the server fell back to step {step}: repeating step {done}")
            self.losses = self.losses[:step]

    def _step(self, server: Any, step: int) -> None:
        windows, lengths = self._batch(step)
        answers, start = self.training.text_answers(step, windows, lengths), time.perf_counter()
        data = server.infer(self.training.encrypt_windows(step, windows, lengths), answers)
        with finished_step(self.folder / "client"):
            answers.check()
            loss, report = self.training.read_step(data, step, windows, lengths)
        report |= {"step_seconds": time.perf_counter() - start}
        self.reports.append(report)
        self.losses.append(loss)
        write_file(self.folder / "client" / LOSSES_FILE, json.dumps(self.losses).encode(), secret=True)
        self._announce(f"step {step}/{self.settings.steps}: loss {loss:.5f}, {report['step_seconds']:.1f} s, {report['refreshes']} round trips")

    def _finish(self, data: bytes) -> dict[str, Any]:
        """Both forms of the adapter on the disk, the decrypted one for the client only (mode 0700), and how far it is from the twin's."""
        training, settings = self.training, self.settings
        message = EncryptedAdapterMessage.from_bytes(data)
        step, state = training.read_adapter(data)
        lora = EncryptedLora(self.client.identity, settings.rank, settings.target_modules, message.weights)
        (self.folder / "encrypted_adapter").mkdir(exist_ok=True)
        lora.save(self.folder / "encrypted_adapter")
        twin = self.twin
        start = {name: value.detach().clone() for name, value in training.layout.values(training.model).items()}
        training.layout.load(training.model, state)
        (self.folder / "adapter").mkdir(exist_ok=True, mode=0o700)
        training.model.save_pretrained(self.folder / "adapter")
        seconds = [report["step_seconds"] for report in self.reports]
        return {
            "backend": self.client.backend.name,
            "steps": step,
            "losses": self.losses,
            "losses_polynomial": twin.losses,
            "adapter_relative_error": relative_error(state, twin.adapter),
            "update_relative_error": relative_error(state, twin.adapter, start),
            "seconds_per_step": float(np.mean(seconds)) if seconds else None,
            "server_seconds_per_step": float(np.mean([report["seconds"] for report in self.reports])) if seconds else None,
            "refreshes_per_step": float(np.mean([report["refreshes"] for report in self.reports])) if seconds else None,
            "operations": self.reports[-1]["operations"] if seconds else {},
            "peak_memory_gb": max((report["peak_memory_bytes"] for report in self.reports), default=0) / 1e9,
        }

    @cached_property
    def twin(self) -> LanguageTwin:
        """The same steps in the clear, in polynomial mode."""
        torch.manual_seed(self.seed)
        twin = LanguageTwin(adapted_decoder(load_decoder(self._directory).double(), self.settings), self.settings)
        for step in range(1, self.settings.steps + 1):
            twin.text_step(*self._batch(step))
        return twin

    def _keep_ranges(self) -> None:
        """Take all steps in the clear, which the report needs anyway."""
        try:
            self.twin  # noqa: B018
        except RangeError as error:
            rate = self.settings.learning_rate
            raise RangeError(f"training would leave a fitted range ({error}): lower the learning rate, now {rate:g}, or take fewer steps") from error

    def _batch(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        rows = self.order.step(step)
        return self.windows[rows], self.lengths[rows]

    def _accepted(self, windows: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The windows whose values stay in every fitted range."""
        kept, reason = [], ""
        for row, window in enumerate(windows):
            try:
                with torch.no_grad():
                    self.client.model(window[None], use_cache=False)
                kept.append(row)
            except RangeError as error:
                reason = str(error)
        if not kept:
            raise RangeError(f"every window of the text was refused; the last: {reason}")
        if len(kept) < len(windows):
            self._announce(f"{len(windows) - len(kept)} of {len(windows)} windows are left out ({reason})")
        return windows[kept], lengths[kept]

    def _check_settings(self, asked: TrainingSettings, began: TrainingSettings) -> None:
        if asked.steps != began.steps <= len(self.losses):
            raise TrainingError(f"the run in {self.folder} has finished its {began.steps} steps: begin one of {asked.steps} in another output folder")
        replace(asked, divisor=began.divisor, eps=began.eps).check(began)

    def _calibrated(self, draft: TrainingSettings) -> TrainingSettings:
        """The range of the gradients, found in the clear on the first steps."""
        torch.manual_seed(self.seed)
        adapted = adapted_decoder(copy.deepcopy(self.client.model), draft)
        trained, largest = [parameter for parameter in adapted.parameters() if parameter.requires_grad], 0.0
        for step in range(1, min(CALIBRATION_STEPS, draft.steps) + 1):
            windows, lengths = self._batch(step)
            summed, tokens = next_token_loss(adapted(windows, use_cache=False).logits, windows, lengths)
            largest = max(largest, *(float((gradient / tokens).abs().max()) ** 2 for gradient in torch.autograd.grad(summed, trained)))
        divisor, eps = calibrate_divisor(largest)
        return replace(draft, divisor=divisor, eps=eps)

    @contextmanager
    def _connected(self) -> Iterator[Any]:
        if self._server is not None:
            yield self._server
            return
        arguments = ["--generate", "--context", str(self.client.packing.tokens)]
        with local_servers(self._directory, self.prepare(), self.refresh, finetune=self.folder / "server", arguments=arguments) as (server,):
            self._announce(f"server: a process with the model and the evaluation-key file only, at {server.url}")
            yield server


def _read_saved(folder: Path, context: int) -> dict[str, Any]:
    """Of a run to resume. Raises TrainingError when it began with another context, CorruptFileError for a damaged file."""
    saved = read_run(folder)
    if saved.get("context") != context:
        raise TrainingError(f"the run began with a context of {saved.get('context')} tokens: resume with that, or choose another output folder")
    return saved


def _read_losses(path: Path) -> list[float]:
    try:
        losses = json.loads(read_file(path, "losses"))
        if not isinstance(losses, list) or not all(type(loss) is float and math.isfinite(loss) for loss in losses):
            raise ValueError
        return losses
    except (ValueError, RecursionError):
        raise CorruptFileError(f"{path} is not readable: start the run again in another folder") from None


def text_windows(ids: Sequence[int], context: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids as windows [n, context] one after another, the last one filled up with the text itself, and how many tokens of each count.

    Raises DataError for a text of less than two tokens.
    """
    ids = list(ids)
    starts = [start for start in range(0, len(ids), context) if len(ids) - start >= 2]
    if not starts:
        raise DataError("the text has less than two tokens: there is nothing to predict")
    filled = ids * (context // len(ids) + 2)
    windows = [filled[start : start + context] for start in starts]
    return torch.tensor(windows), torch.tensor([min(context, len(ids) - start) for start in starts])
