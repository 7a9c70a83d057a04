"""What one training step computes, wherever it runs: on a server's ciphertexts, on the simulator, or on a backend that only counts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import nn

from hf_he.backends import Ciphertext
from hf_he.errors import ModelMismatchError
from hf_he.finetuning.adapter import AdapterLayout, EncryptedAdapter
from hf_he.finetuning.loss import CrossEntropy, MeanSquaredError
from hf_he.finetuning.optimizer import SGD, AdamWHE, Optimizer, fitting
from hf_he.finetuning.protocol import TrainingSettings
from hf_he.finetuning.schedule import learning_rate
from hf_he.ops.operand import Operand
from hf_he.peft import HELoraConfig, with_fresh_adapter
from hf_he.tensor import EncryptedSession, state_tensor

Ask = Callable[[Ciphertext], Ciphertext]


def adapted_model(model: nn.Module, settings: TrainingSettings) -> nn.Module:
    """`model` as a PEFT model with a fresh adapter of these settings; the classifier is trained too. Raises ModelMismatchError without such modules."""
    check_targets(model, settings.target_modules)
    config = HELoraConfig(r=settings.rank, target_modules=list(settings.target_modules), modules_to_save=["classifier"], task_type="SEQ_CLS")
    return with_fresh_adapter(model, config)


def check_targets(model: nn.Module, targets: Sequence[str]) -> None:
    """Raise ModelMismatchError, with the names there are, for a target that ends the name of no linear layer: peft skips one beside others that do."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    unknown = [target for target in targets if not any(f".{name}".endswith(f".{target}") for name in names)]
    if unknown:
        known = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in names))
        raise ModelMismatchError(f"this model has no modules {', '.join(unknown)} to adapt: its linear layers are {known}")


def make_optimizer(settings: TrainingSettings) -> Optimizer:
    """The optimiser of these settings, for ciphertexts and for arrays."""
    if settings.optimizer == "sgd":
        return SGD(settings.momentum, settings.weight_decay, settings.divisor)
    optimizer = AdamWHE(settings.beta1, settings.beta2, settings.eps, settings.divisor, settings.weight_decay)
    degree, newton_steps = fitting(settings.eps / settings.divisor)
    return replace(optimizer, degree=degree, newton_steps=newton_steps)


def make_loss(settings: TrainingSettings, num_labels: int) -> CrossEntropy | MeanSquaredError:
    """Cross-entropy of classes, squared error of a single output."""
    return MeanSquaredError() if num_labels == 1 else CrossEntropy(num_labels, settings.loss_bound, settings.loss_degree)


@dataclass(frozen=True)
class MicroBatch:
    """One packed batch: ciphertexts [blocks], [1], [blocks of the labels], [1]; the mask is an array [1, slots] where masks are public."""

    embeddings: Ciphertext = field(repr=False)
    attention_mask: Ciphertext | np.ndarray = field(repr=False)
    labels: Ciphertext = field(repr=False)
    sequence_weights: Ciphertext = field(repr=False)


class TrainingRun:
    """A model with an encrypted adapter and its optimiser on one session. `load` before anything else."""

    def __init__(self, session: EncryptedSession, model: nn.Module, settings: TrainingSettings) -> None:
        self.session, self.settings = session, settings
        self.model = self.adapted(model, settings)
        self.num_labels = self.model.config.num_labels
        self.layout = AdapterLayout.of(self.model, session.packing)
        self.optimizer = make_optimizer(settings)
        self.loss = make_loss(settings, self.num_labels)
        self.adapter: EncryptedAdapter | None = None
        self.state: dict[str, Ciphertext] = {}
        self._installed = False

    @staticmethod
    def adapted(model: nn.Module, settings: TrainingSettings) -> nn.Module:
        return adapted_model(model, settings)

    def load(self, weights: Ciphertext, state: dict[str, Ciphertext] | None = None) -> None:
        """Go on from dense weights [count] and the optimiser's state, None before the first step. Nothing is computed yet."""
        if self.adapter is None:
            self.adapter = EncryptedAdapter(self.session, self.model, self.layout, weights)
        self.adapter.replace(weights)
        self.state = {} if state is None else state
        self._installed = False

    def prepare(self) -> None:
        """Give the model its weights, without gradients: the first thing of a step. Refreshes the dense weights where they are exhausted."""
        if not self._installed:
            self.adapter.install()
            self._installed = True

    def micro_batch(self, batch: MicroBatch, ask: Ask | None = None) -> Ciphertext:
        """Forward and backward; the gradients stay in the adapter. Returns the encrypted logits [blocks].

        With `ask` the loss gradient with respect to the logits comes from there instead of from the encrypted labels.
        """
        session = self.session
        inputs = {"embedding_output": session.hidden_state(batch.embeddings), "attention_mask": session.attention_mask(self._mask(batch))}
        if ask is None:
            dtype = torch.float32 if self.num_labels == 1 else torch.int64
            output = self.model(**inputs, labels=session.labels(batch.labels, batch.sequence_weights, self.num_labels, dtype, self.loss))
            output.loss.backward()
        else:
            output = self.model(**inputs)
            gradient = state_tensor(Operand(session, self.num_labels, ask(output.logits.ciphertext), pooled=True))
            torch.autograd.backward([output.logits], [gradient])
        return output.logits.ciphertext

    def gradient(self, sequences: int) -> Ciphertext:
        """The dense gradient [count] of the mean loss over `sequences` examples, out of the micro-batches since `prepare`, times gradient_gain and the
        scales of the settings."""
        return self.adapter.collect(self.optimizer.gradient_gain / (sequences * self.settings.loss_scale), self.settings.gradient_scales)

    def forget(self) -> None:
        """Drop the gradients of an unfinished step."""
        self._installed = False

    def update(self, gradient: Ciphertext, step: int) -> tuple[Ciphertext, dict[str, Ciphertext]]:
        """Weights and optimiser state after step `step`; nothing is installed."""
        settings = self.settings
        rate = learning_rate(settings.schedule, settings.learning_rate, step, settings.steps, settings.warmup_steps)
        return self.optimizer.step(self.session, self.adapter.dense, gradient, self.state, rate, step)

    def _mask(self, batch: MicroBatch) -> Ciphertext:
        """The mask as a ciphertext; a public one as a noiseless encryption that hides nothing."""
        mask, backend = batch.attention_mask, self.session.backend
        if isinstance(mask, Ciphertext):
            return mask
        zero = backend.take(batch.embeddings, slice(0, 1))
        return backend.add_plain(backend.subtract(zero, zero), backend.encode(mask, zero.level, zero.scale))
