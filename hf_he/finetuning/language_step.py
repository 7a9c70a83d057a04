"""One training step of a decoder with LoRA layers, on a server's ciphertexts or on a backend that only counts; and its plaintext twin."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn
from torch.nn import functional as F

from hf_he.backends import Ciphertext
from hf_he.ckks.parameters import CKKSParameters
from hf_he.errors import ModelMismatchError
from hf_he.finetuning.plan import StepPlan, plan_run
from hf_he.finetuning.protocol import TrainingSettings
from hf_he.finetuning.reference import PolynomialTraining
from hf_he.finetuning.step import Ask, TrainingRun, check_targets
from hf_he.packing import Packing
from hf_he.peft import HELoraConfig, with_fresh_adapter
from hf_he.planner import CountingSession

PROJECTIONS = {"he_gpt_neox": ("query_key_value",), "he_llama": ("q_proj", "k_proj", "v_proj")}
"""What gets an adapter where nothing else is named, by model_type: queries, keys and values."""


def adapted_decoder(model: nn.Module, settings: TrainingSettings) -> nn.Module:
    """`model` as a PEFT model with a fresh adapter of these settings. Raises ModelMismatchError when it has no such modules, or one is the head."""
    check_targets(model, settings.target_modules)
    adapted = with_fresh_adapter(model, HELoraConfig(r=settings.rank, target_modules=list(settings.target_modules), task_type="CAUSAL_LM"))
    if any(parameter.requires_grad for parameter in adapted.get_base_model().get_output_embeddings().parameters()):
        raise ModelMismatchError("the head of a decoder is the client's part of a step and cannot be adapted: leave it out of target_modules")
    return adapted


class LanguageRun(TrainingRun):
    """A decoder with an encrypted adapter and its optimiser on one session."""

    @staticmethod
    def adapted(model: nn.Module, settings: TrainingSettings) -> nn.Module:
        return adapted_decoder(model, settings)

    def text_batch(self, embeddings: Ciphertext, ask: Ask) -> Ciphertext:
        """Forward, and backward of the gradient [blocks] in the last hidden states that `ask` returns for them; returns those states [blocks]."""
        state = self.session.hidden_state(embeddings)
        hidden = self.model.get_base_model().base_model(inputs_embeds=state, use_cache=False).last_hidden_state
        torch.autograd.backward([hidden], [self.session.hidden_state(ask(hidden.ciphertext))])
        return hidden.ciphertext


def plan_language_step(model: nn.Module, parameters: CKKSParameters, packing: Packing, settings: TrainingSettings) -> StepPlan:
    """The plan of a training step of the decoder `model`, which gets the adapter of `settings` (pass a model of your own)."""
    session = CountingSession(parameters, packing)
    run = LanguageRun(session, model, replace(settings, steps=max(settings.steps, 2)))
    blocks = replace(session.backend.fresh(session.top), batch_shape=(packing.blocks(run.model.config.hidden_size),))
    return plan_run(session, run, lambda: run.text_batch(blocks, lambda hidden: blocks))


class LanguageTwin(PolynomialTraining):
    """The plaintext twin: every call of `text_step` is one step of an encrypted run with these settings."""

    def text_step(self, windows: torch.Tensor, lengths: torch.Tensor) -> float:
        """One update on windows [n, T], of which the first `lengths` [n] tokens count. Returns the mean loss of a predicted token before it."""
        summed, tokens = next_token_loss(self.model(windows, use_cache=False).logits, windows, lengths)
        self.losses.append(float(summed.detach()) / tokens)
        gradients = torch.autograd.grad(summed / tokens, list(self._trained.values()))
        self._update(dict(zip(self._trained, gradients, strict=True)))
        return self.losses[-1]


def next_token_loss(logits: torch.Tensor, windows: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Cross-entropy of every next token in the first `lengths` [n] tokens of windows [n, T], summed, and how many these are."""
    targets = windows[:, 1:].masked_fill(torch.arange(1, windows.shape[1]) >= lengths[:, None], -100)
    summed = F.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), targets.reshape(-1), reduction="sum")
    return summed, int((targets >= 0).sum())
