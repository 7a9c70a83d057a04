"""`EncryptedTrainer`: transformers' Trainer conventions around a server that trains on ciphertexts.

    args = EncryptedTrainingArguments("out/run", max_steps=10, lora_rank=2)
    trainer = EncryptedTrainer("model_cards/he-bert-tiny-mr", args, train_dataset, eval_dataset)
    trainer.train()                     # or train(resume_from_checkpoint=True)
    trainer.save_model()                # a plain PEFT adapter: PeftModel.from_pretrained(model, "out/run/adapter")

Below `output_dir`, `client` (mode 0700: keys, log history, settings) belongs to the client and `server` to the server process, which gets the
evaluation keys and encrypted messages only.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback, ProgressCallback, TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_utils import TrainOutput

from hf_he.checkpoints import load_classifier
from hf_he.client import Client
from hf_he.errors import CheckpointError, CorruptFileError, DataError, TrainingError
from hf_he.evaluation import evaluate_model
from hf_he.finetuning.arguments import EncryptedTrainingArguments
from hf_he.finetuning.client import TrainingClient
from hf_he.finetuning.client_folder import RUN_FILE, finished_step, read_run, write_run
from hf_he.finetuning.examples import accepted, as_text_dataset, check_examples, labelled
from hf_he.finetuning.order import DataOrder
from hf_he.finetuning.plan import choose_step_packing
from hf_he.finetuning.protocol import RunId, TrainingSettings
from hf_he.keys import EVALUATION_FILE, SECRET_FILE
from hf_he.local_server import local_servers
from hf_he.protocol import SEQUENCE_LENGTH
from hf_he.results import merge_reports
from hf_he.serialization import write_file

STATE_FILE = "trainer_state.json"
Announce = Callable[[str], None]


class EncryptedTrainer:
    """Fine-tunes LoRA adapters of the model in folder `model` (or of a PreTrainedModel, which is saved below `output_dir` first) on encrypted examples.

    Args:
        train_dataset, eval_dataset: `hf_he.data.TextDataset`, or anything that has columns text (or sentence) and label, such as a `datasets.Dataset`.
        processing_class: the tokenizer, needed only with a PreTrainedModel; a folder brings its own.
        callbacks: transformers' TrainerCallbacks. Logs carry loss, learning_rate, epoch and what the server reported.
        servers: connections to running training servers, one per rank, which were started with the keys of `prepare()`; by default
            `args.processes` are started as child processes.
        announce: receives a line about what takes long, or was refused.
    """

    def __init__(
        self,
        model: str | Path | PreTrainedModel,
        args: EncryptedTrainingArguments,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        callbacks: Sequence[TrainerCallback] = (),
        servers: Sequence[Any] | None = None,
        announce: Announce = lambda text: None,
    ) -> None:
        self.args = args
        self.folder = Path(args.output_dir)
        self.model_folder = _saved(model, processing_class, self.folder / "model")
        self.train_dataset = None if train_dataset is None else as_text_dataset(train_dataset, "train")
        self.eval_dataset = None if eval_dataset is None else as_text_dataset(eval_dataset, "dev")
        self._servers, self._announce = servers, announce
        self._rows: dict[int, list[int]] = {}
        self.reports: list[dict[str, Any]] = []
        self.training: TrainingClient | None = None
        own = [DefaultFlowCallback] + ([] if args.disable_tqdm else [ProgressCallback])
        self.callback_handler = CallbackHandler([*own, *callbacks], None, processing_class, None, None)
        self.state, self.control = TrainerState(), TrainerControl()
        self.control = self.callback_handler.on_init_end(args, self.state, self.control)

    def add_callback(self, callback: type[TrainerCallback] | TrainerCallback) -> None:
        self.callback_handler.add_callback(callback)

    # ---- training ----
    def prepare(self) -> Path:
        """Begin a run without a server: keys, settings and data order. Returns the evaluation-key file, which training servers are started with;
        `train(resume_from_checkpoint=True)` then goes on."""
        self._open(resume=False)
        return self._evaluation_keys

    def train(self, resume_from_checkpoint: bool | str | None = None) -> TrainOutput:
        """Train to the end of the schedule; with `resume_from_checkpoint`, from the last step that both sides finished.

        Raises TrainingError when data, settings or keys are not those the run began with, CheckpointError when there is nothing to resume, RangeError
        when logits or refreshed values left their range, and what the server reports.
        """
        resume = bool(resume_from_checkpoint or self.args.resume_from_checkpoint)
        if self.train_dataset is None:
            raise DataError("there is nothing to train on: pass train_dataset")
        self._open(resume)
        start = time.perf_counter()
        with self._connected() as servers:
            self._align(servers, resume)
            self._loop(servers)
            self._fetch(servers[0])
        losses = [entry["loss"] for entry in self.state.log_history if "loss" in entry]
        metrics = {"train_runtime": time.perf_counter() - start, "train_loss": float(np.mean(losses)) if losses else float("nan")}
        return TrainOutput(self.state.global_step, metrics["train_loss"], metrics)

    def evaluate(self, eval_dataset: Any = None) -> dict[str, float]:
        """Score of the decrypted adapter on the plaintext model in polynomial mode, which is what runs encrypted."""
        dataset = self.eval_dataset if eval_dataset is None else as_text_dataset(eval_dataset, "dev")
        if dataset is None:
            raise DataError("there is nothing to evaluate on: pass eval_dataset")
        training = self._opened()
        dataset = labelled(dataset, training.client.model.config)
        result = evaluate_model(training.model, training.client.tokenizer, dataset, batch_size=self.args.per_device_eval_batch_size)
        metrics = {f"eval_{result.metric}": result.score, "eval_rows": len(dataset), "epoch": self.state.epoch}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def save_model(self, output_dir: str | Path | None = None) -> Path:
        """Write the adapter, in the clear and for the client only (mode 0700), as a plain PEFT adapter; default: `output_dir`/adapter."""
        folder = Path(output_dir or self.folder / "adapter")
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        model = self._opened().model
        for config in model.peft_config.values():
            config.base_model_name_or_path = str(self.model_folder)
        model.save_pretrained(folder)
        return folder

    def log(self, logs: dict[str, float]) -> None:
        """Add an entry to the log history, as transformers' Trainer does."""
        self.state.log_history.append({**logs, "step": self.state.global_step})
        self.control = self.callback_handler.on_log(self.args, self.state, self.control, logs)

    @property
    def model(self) -> Any:
        """The plain PEFT model, its adapter as it was last decrypted."""
        return self._opened().model

    @property
    def ranks(self) -> int:
        """Server processes that share each step."""
        return self.args.processes if self._servers is None else len(self._servers)

    @property
    def report(self) -> dict[str, Any] | None:
        """The server's measurements of the steps of this process, added up."""
        return merge_reports(self.reports) if self.reports else None

    # ---- the two halves of a run ----
    def _open(self, resume: bool) -> None:
        """The client's half: keys, settings, data order."""
        own = self.folder / "client"
        known = (own / RUN_FILE).is_file()
        if known and not resume:
            raise CheckpointError(f"{self.folder} holds a run already: resume it, or choose another output folder")
        if resume and not known:
            raise CheckpointError(f"{self.folder} holds no run to resume: start one without resume")
        own.mkdir(parents=True, exist_ok=True, mode=0o700)
        saved = read_run(own) if known else None
        keys = own / "keys"
        ready = saved is not None and (keys / SECRET_FILE).is_file() and (keys / EVALUATION_FILE).is_file()
        args = self.args
        how = {"backend": args.backend, "parameters": args.parameter_set_name, "features": args.features}
        client = Client.from_pretrained(self.model_folder, keys=keys if ready else None, **how)
        check_examples(self.train_dataset)
        dataset = self.train_dataset = labelled(self.train_dataset, client.model.config)
        self.eval_dataset = None if self.eval_dataset is None else labelled(self.eval_dataset, client.model.config)
        self.order = DataOrder(len(dataset), args.per_device_train_batch_size, args.seed if args.data_seed is None else args.data_seed)
        if saved is None:
            saved = {"run": secrets.token_hex(8), "order_key": secrets.token_hex(32), "settings": asdict(self._calibrated(client))}
        order = self.order.digest(bytes.fromhex(saved["order_key"]), dataset.first, dataset.labels)
        settings = TrainingSettings.from_bytes(json.dumps(saved["settings"]).encode())
        if known:
            self._check_settings(settings, len(dataset))
        folder = own if settings.optimizer_location == "client" else None
        self.training = TrainingClient(client, settings, RunId(saved["run"], order), args.seed, folder)
        if not ready:
            self._announce("Generating keys")
            generated = self.training.keygen()
            generated.save(keys, bootstrapping=args.refresh == "bootstrap")
            client.use_keys(replace(generated, evaluation=None))
        if not known:
            write_run(own, saved)
        self.callback_handler.model = self.training.model
        self._load_state(own / STATE_FILE if known else None)

    def _calibrated(self, client: Client) -> TrainingSettings:
        """The settings, their open ranges found in the clear on the client's own examples."""
        from hf_he.finetuning.calibration import calibrate

        args, rows = self.args, len(self.train_dataset)
        draft = self._packed(client, args.settings(rows, divisor=1.0, eps=0.02, loss_bound=12.0))
        if None not in (args.divisor, args.eps, args.loss_bound) and args.refresh != "bootstrap":
            return draft
        steps = range(1, min(args.calibration_steps, self.order.steps_per_epoch) + 1)
        self._announce(f"Calibrating on the examples of {len(steps)} steps in the clear")
        batches = [accepted(client, self.train_dataset, self.order.step(number))[0] for number in steps]
        found = calibrate(self.model_folder, client.tokenizer, self.train_dataset, draft, batches, args.seed, args.calibrated_eps_ratio)
        return args.settings(rows, **asdict(found), features=draft.features)

    def _packed(self, client: Client, draft: TrainingSettings) -> TrainingSettings:
        """The settings with the features per ciphertext that the arguments ask for, or the planner's choice."""
        if draft.features or len(client.packings) == 1:
            return draft
        choice = choose_step_packing(lambda: load_classifier(self.model_folder), client.backend.parameters, SEQUENCE_LENGTH, draft, self.ranks)
        self._announce(f"packing: {choice.reason}")
        return replace(draft, features=choice.packing.features)

    def _check_settings(self, settings: TrainingSettings, rows: int) -> None:
        found = ("divisor", "eps", "loss_bound", "loss_scale", "gradient_scales", "features")
        self.args.settings(rows, **{name: getattr(settings, name) for name in found}).check(settings)

    def step_rows(self, number: int) -> list[int]:
        """The examples of a step. Those whose values leave a fitted range of the start model are left out: nobody could see that under encryption.

        Raises RangeError when none is left.
        """
        if number not in self._rows:
            rows, announced = accepted(self._opened().client, self.train_dataset, self.order.step(number))
            if announced:
                self._announce(f"step {number}: {announced}")
            self._rows = {number: rows}
        return self._rows[number]

    def _load_state(self, path: Path | None) -> None:
        callbacks = [callback for callback in self.callback_handler.callbacks if hasattr(callback, "state")]
        settings = self._opened().settings
        if path is not None and path.is_file():
            try:
                self.state = TrainerState(**json.loads(path.read_bytes()))
            except (ValueError, TypeError, RecursionError):
                raise CorruptFileError(f"{path} is not readable: remove it to resume without the log history") from None
        else:
            self.state = TrainerState(stateful_callbacks=callbacks)
        self.state.max_steps = settings.steps
        self.state.num_train_epochs = -(-settings.steps // self.order.steps_per_epoch)
        self.state.train_batch_size = settings.sequences
        self.state.compute_steps(self.args, settings.steps)

    def _save_state(self) -> None:
        write_file(self.folder / "client" / STATE_FILE, json.dumps(asdict(self.state), indent=2, sort_keys=True).encode(), secret=True)

    @contextmanager
    def _connected(self) -> Iterator[Sequence[Any]]:
        if self._servers is not None:
            yield self._servers
            return
        args = self.args
        self._announce(f"Starting {'a server process' if args.processes == 1 else f'{args.processes} server processes'}")
        with local_servers(self.model_folder, self._evaluation_keys, args.refresh, finetune=self.folder / "server", processes=args.processes) as servers:
            yield servers

    def _align(self, servers: Sequence[Any], resume: bool) -> None:
        """Bring both halves to the same step: the last one that the server has on its disk."""
        training, found = self._opened(), [server.describe().get("training", {}) for server in servers]
        steps = {entry.get("step", -1) for entry in found}
        if len(steps) != 1:
            raise CheckpointError(f"the server processes are at different steps ({sorted(steps)}): start them again")
        step = steps.pop()
        if step < 0:
            if self.state.global_step:
                raise CheckpointError(f"the server's folder is empty, this client is at step {self.state.global_step}: give the server the folder of this run")
            for answer in self._everywhere(servers, [training.setup()] * len(servers)):
                training.read_adapter(answer)
            step = 0
        elif any(RunId(entry.get("run", ""), entry.get("order", "")) != training.run for entry in found):
            RunId(found[0].get("run", ""), found[0].get("order", "")).check(training.run)
        if step not in (self.state.global_step - 1, self.state.global_step, self.state.global_step + 1):
            raise CheckpointError(f"the server is at step {step}, this client at {self.state.global_step}: their folders belong to different runs")
        if step < self.state.global_step:
            self._announce(f"the server fell back to step {step}: repeating step {step + 1}")
            self.state.global_step = step
            self.state.log_history = [entry for entry in self.state.log_history if entry["step"] <= step]
        if resume:
            self._announce(f"Resuming after step {self.state.global_step} of {self.state.max_steps}")

    def _loop(self, servers: Sequence[Any]) -> None:
        handler, args, state = self.callback_handler, self.args, self.state
        self.control = handler.on_train_begin(args, state, self.control)
        while state.global_step < state.max_steps and not self.control.should_training_stop:
            number = state.global_step + 1
            if (number - 1) % self.order.steps_per_epoch == 0:
                self.control = handler.on_epoch_begin(args, state, self.control)
            self.control = handler.on_step_begin(args, state, self.control)
            logs = self._step(servers, number)
            state.global_step, state.epoch = number, self.order.epoch(number)
            self.control = handler.on_step_end(args, state, self.control)
            if self.control.should_log:
                self.log(logs)
            if self.control.should_evaluate:
                self._fetch(servers[0])
                self.evaluate()
            if number % self.order.steps_per_epoch == 0 or number == state.max_steps:
                self.control = handler.on_epoch_end(args, state, self.control)
            self._save_state()
        self.control = handler.on_train_end(args, state, self.control)
        self._save_state()

    def _step(self, servers: Sequence[Any], number: int) -> dict[str, float]:
        training, dataset, start = self._opened(), self.train_dataset, time.perf_counter()
        chosen = self.step_rows(number)
        labels = [dataset.labels[row] for row in chosen]
        parts = training.encrypt_step(number, [dataset.first[row] for row in chosen], labels, len(servers))
        answers = [training.answers(number, part.rows, labels) for part in parts]
        results = self._everywhere(servers, [part.data for part in parts], answers)
        reports, logits = [], np.zeros((len(chosen), training.num_labels))
        with finished_step(self.folder / "client"):
            for part, answer, data in zip(parts, answers, results, strict=True):
                answer.check()
                values, report = training.read_result(data, number, part.rows)
                rows = [row for chunk in part.rows for row in chunk]
                logits[rows] = values
                reports.append(report)
            loss = training.loss(logits, labels)
        self.reports += reports
        total = merge_reports(reports)
        return {
            "loss": loss,
            "learning_rate": training.learning_rate(number),
            "epoch": self.order.epoch(number),
            "seconds": time.perf_counter() - start,
            "server_seconds": max(report["seconds"] for report in reports),
            "bootstraps": total["bootstraps"],
            "refreshes": total["refreshes"],
        }

    def _everywhere(self, servers: Sequence[Any], messages: Sequence[bytes], answers: Sequence[Callable[[bytes], bytes]] | None = None) -> list[bytes]:
        """Every rank's answer to its message; the ranks work at the same time."""
        answers = answers or [self._opened().answers(0, [], [])] * len(servers)
        if len(servers) == 1:
            return [servers[0].infer(messages[0], answers[0])]
        with ThreadPoolExecutor(len(servers)) as pool:
            return [job.result() for job in [pool.submit(server.infer, *rest) for server, *rest in zip(servers, messages, answers, strict=True)]]

    def _fetch(self, server: Any) -> None:
        """The adapter as it is on the server, decrypted into `model`."""
        training = self._opened()
        (answer,) = self._everywhere([server], [training.request()])
        _, state = training.read_adapter(answer)
        training.layout.load(training.model, state)

    @property
    def _evaluation_keys(self) -> Path:
        return self.folder / "client" / "keys" / EVALUATION_FILE

    def _opened(self) -> TrainingClient:
        if self.training is None:
            raise TrainingError("this run is not open yet: call train() first")
        return self.training


def _saved(model: str | Path | PreTrainedModel, processing_class: Any, folder: Path) -> Path:
    if not isinstance(model, PreTrainedModel):
        return Path(model)
    if processing_class is None:
        raise DataError("a model object needs its tokenizer: pass processing_class, or the folder both were saved in")
    model.save_pretrained(folder)
    processing_class.save_pretrained(folder)
    return folder
