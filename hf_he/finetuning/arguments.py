"""`EncryptedTrainingArguments`: transformers' TrainingArguments where they have a meaning on ciphertexts, and what encryption adds."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import MISSING, dataclass, field
from typing import Any

from transformers import TrainingArguments

from hf_he.errors import ParameterError
from hf_he.finetuning.protocol import TrainingSettings

SUPPORTED = frozenset(
    {
        "output_dir", "per_device_train_batch_size", "num_train_epochs", "max_steps", "learning_rate", "lr_scheduler_type", "warmup_steps",
        "optim", "weight_decay", "adam_beta1", "adam_beta2", "max_grad_norm", "logging_strategy", "logging_steps", "logging_first_step", "disable_tqdm",
        "report_to", "run_name", "project", "eval_strategy", "eval_steps", "eval_delay", "per_device_eval_batch_size", "eval_on_start", "seed", "data_seed",
        "use_cpu", "resume_from_checkpoint", "save_strategy", "do_train", "do_eval", "log_level",
    }
)  # fmt: skip
"""The fields of TrainingArguments that are used; a value other than the default in any other is an error."""

_WHY = {
    "max_grad_norm": "the norm of an encrypted gradient is not known to the server: leave it at 0",
    "gradient_accumulation_steps": "a batch is packed into micro-batches by itself: set per_device_train_batch_size",
    "adam_epsilon": "AdamW-HE has eps inside the root: set `eps`",
    "save_strategy": "the server checkpoints after every step",
}


@dataclass
class EncryptedTrainingArguments(TrainingArguments):
    """Arguments of `EncryptedTrainer`. Fields of TrainingArguments without a meaning on ciphertexts are refused by name (ParameterError).

    Inherited: `optim` is "adamw_torch" (AdamW-HE) or "sgd" (with `momentum`); `lr_scheduler_type` constant, linear or cosine;
    `per_device_train_batch_size` the examples of one step, packed into as many micro-batches as the parameters ask for; `max_steps` > 0 shortens the
    schedule of `num_train_epochs` as it does in transformers. The server checkpoints after every step.

    Args:
        backend, parameters: HE backend and CKKS parameter set; `parameters` defaults to n14, with bootstrapping to n16-bootstrap.
        refresh: "client" (round trips) or "bootstrap".
        optimizer_location: "server" (it sees nothing) or "client" (one round trip per step: the client computes the update and sees the gradient).
        loss_location: "server" (softmax as polynomials on encrypted labels) or "client" (one round trip per micro-batch).
        public_padding_mask: send padding masks in the clear; the server then learns the lengths.
        lora_rank, target_modules: rank of the adapters, and the linear layers that get one.
        divisor, eps, loss_bound: ranges of the polynomials of AdamW-HE and of the softmax (see hf_he.finetuning.optimizer and .loss); what is not given the
            client calibrates in the clear on the examples of the first `calibration_steps` steps. Divisor and eps are in units of squared
            gradients scaled to about 1, parameter by parameter; with all three given nothing is calibrated and nothing scaled.
        eps_ratio: eps over divisor where eps is calibrated, from 1e-5 to 0.1. A smaller one is nearer to AdamW and amplifies noise: a step's error grows
            with its inverse square root, so with bootstrapping (error 1e-5) it is at least 0.001.
        momentum: of sgd.
        processes: server processes that share the micro-batches of a step.
        features: per ciphertext, the hidden size or 1; None leaves it to the planner, which says why (one pays for steps of hundreds of examples).
    """

    per_device_train_batch_size: int = 16
    learning_rate: float = 4e-3
    lr_scheduler_type: str = "cosine"
    max_grad_norm: float = 0.0
    logging_steps: float = 1
    use_cpu: bool = True
    save_strategy: str = "no"
    seed: int = 0

    backend: str = field(default="auto", metadata={"help": "auto, native or simulator."})
    parameters: str | None = field(default=None, metadata={"help": "CKKS parameter set."})
    refresh: str = field(default="client", metadata={"help": "client or bootstrap."})
    optimizer_location: str = field(default="server", metadata={"help": "server or client."})
    loss_location: str = field(default="server", metadata={"help": "server or client."})
    public_padding_mask: bool = field(default=False, metadata={"help": "Send padding masks in the clear."})
    lora_rank: int = field(default=2, metadata={"help": "Rank of the LoRA adapters."})
    target_modules: tuple[str, ...] = field(default=("query", "key", "value"), metadata={"help": "Linear layers with an adapter."})
    divisor: float | None = field(default=None, metadata={"help": "Bound of v_hat + eps; default: calibrated on the client."})
    eps: float | None = field(default=None, metadata={"help": "Added to v_hat inside the root; default: `eps_ratio` of the divisor."})
    eps_ratio: float = field(default=1e-3, metadata={"help": "eps over the calibrated divisor."})
    loss_bound: float | None = field(default=None, metadata={"help": "Largest difference of logits; default: calibrated on the client."})
    calibration_steps: int = field(default=16, metadata={"help": "Steps whose examples the client calibrates on."})
    momentum: float = field(default=0.9, metadata={"help": "Of sgd."})
    processes: int = field(default=1, metadata={"help": "Server processes."})
    features: int | None = field(default=None, metadata={"help": "Features per ciphertext; default: as the planner says."})

    def __post_init__(self) -> None:
        _refuse_meaningless(self)
        if str(getattr(self.optim, "value", self.optim)) not in ("adamw_torch", "adamw_torch_fused", "sgd"):
            raise ParameterError(f"optim {self.optim!r} has no encrypted form: choose adamw_torch (AdamW-HE) or sgd")
        if self.max_grad_norm:
            raise ParameterError(f"max_grad_norm: {_WHY['max_grad_norm']}")
        if self.refresh not in ("client", "bootstrap"):
            raise ParameterError(f"refresh must be client or bootstrap, got {self.refresh!r}")
        if not 1e-5 <= self.eps_ratio <= 0.1:
            raise ParameterError(f"eps_ratio must be from 1e-5 to 0.1, got {self.eps_ratio!r}")
        if self.processes < 1:
            raise ParameterError("processes must be at least 1")
        if self.features is not None and self.features < 1:
            raise ParameterError("features must be at least 1, or None for the planner's choice")
        if str(getattr(self.save_strategy, "value", self.save_strategy)) != "no":
            raise ParameterError(f"save_strategy: {_WHY['save_strategy']}")
        self.target_modules = tuple(self.target_modules)
        super().__post_init__()
        self.settings(1, divisor=1.0, eps=0.02, loss_bound=12.0)

    @property
    def calibrated_eps_ratio(self) -> float:
        return max(self.eps_ratio, 1e-3) if self.refresh == "bootstrap" else self.eps_ratio

    @property
    def parameter_set_name(self) -> str:
        return self.parameters or ("n16-bootstrap" if self.refresh == "bootstrap" else "n14")

    def total_steps(self, rows: int) -> int:
        """Steps of the whole schedule for `rows` examples."""
        if self.max_steps > 0:
            return self.max_steps
        return max(1, math.ceil(self.num_train_epochs * -(-rows // self.per_device_train_batch_size)))

    def settings(
        self,
        rows: int,
        divisor: float,
        eps: float,
        loss_bound: float,
        loss_scale: float = 1.0,
        gradient_scales: tuple[float, ...] = (),
        features: int = 0,
    ) -> TrainingSettings:
        """What the server is told; the numbers are used where the arguments leave theirs open, `loss_scale` with bootstrapping only. Raises
        ParameterError for values that make no sense."""
        steps = self.total_steps(rows)
        return TrainingSettings(
            rank=self.lora_rank,
            target_modules=self.target_modules,
            optimizer="sgd" if self.optim.value == "sgd" else "adamw",
            learning_rate=float(self.learning_rate),
            schedule=self.lr_scheduler_type.value,
            warmup_steps=self.get_warmup_steps(steps),
            steps=steps,
            sequences=self.per_device_train_batch_size,
            momentum=float(self.momentum),
            beta1=float(self.adam_beta1),
            beta2=float(self.adam_beta2),
            eps=float(eps if self.eps is None else self.eps),
            divisor=float(divisor if self.divisor is None else self.divisor),
            weight_decay=float(self.weight_decay),
            loss_bound=float(loss_bound if self.loss_bound is None else self.loss_bound),
            loss_scale=float(loss_scale if self.refresh == "bootstrap" else 1.0),
            gradient_scales=gradient_scales,
            features=features if self.features is None else self.features,
            optimizer_location=self.optimizer_location,
            loss_location=self.loss_location,
            public_padding_mask=self.public_padding_mask,
        )


def _refuse_meaningless(arguments: EncryptedTrainingArguments) -> None:
    for entry in dataclasses.fields(TrainingArguments):
        if entry.name not in SUPPORTED and getattr(arguments, entry.name) != _default(entry):
            raise ParameterError(f"{entry.name} has no meaning in encrypted training: {_WHY.get(entry.name, 'leave it at its default')}")


def _default(entry: dataclasses.Field) -> Any:
    return entry.default_factory() if entry.default_factory is not MISSING else entry.default
