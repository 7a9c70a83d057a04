"""`hf-he convert`: a stock BERT checkpoint as HEBert, optionally calibrated for polynomial mode."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer


def convert(
    source: Annotated[str, typer.Argument(help="Folder of a stock BERT, or the pinned checkpoint bert-tiny or minilm-l6.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    attention_kernel: Annotated[
        Literal["gaussian_kernel", "normalized_gaussian_kernel", "power_softmax", "softmax"], typer.Option(help="Attention of the new model.")
    ] = "gaussian_kernel",
    num_labels: Annotated[int | None, typer.Option(min=1, help="Outputs of a new head, when the source has none.")] = None,
    calibrate: Annotated[Path | None, typer.Option(help="UTF-8 text, one sentence per line: fit polynomials to the ranges it gives.")] = None,
    margin: Annotated[float, typer.Option(min=0.0, help="Widening of the calibrated ranges.")] = 0.25,
    max_length: Annotated[int, typer.Option(min=2, help="Tokens per calibration sentence.")] = 32,
) -> None:
    """Convert a stock BERT checkpoint into an HEBert. Without training its accuracy is not that of the source."""
    from hf_he.checkpoints import load_tokenizer
    from hf_he.data import CHECKPOINTS, TextDataset, fetch_checkpoint
    from hf_he.evaluation import encode_texts
    from hf_he.scripts.display import console
    from hf_he.scripts.files import read_sentences
    from hf_he.training.conversion import calibrated, convert_checkpoint
    from hf_he.training.range_penalty import Degrees, track_ranges

    folder = fetch_checkpoint(source) if source in CHECKPOINTS else Path(source)
    model = convert_checkpoint(folder, attention_kernel, num_labels)
    tokenizer = load_tokenizer(folder, local_files_only=False)
    if calibrate is not None:
        encoded = encode_texts(tokenizer, TextDataset("mr", "train", tuple(read_sentences(calibrate)), None, ()), max_length)
        batches = ({name: tensor[i : i + 256] for name, tensor in encoded.items()} for i in range(0, len(encoded["input_ids"]), 256))
        degrees = Degrees(squarings=7, norm_degree=15, norm_newton_steps=1, activations={"gelu": 31, "relu": 63, "tanh": 15})
        model = calibrated(model, track_ranges(model, batches), degrees, margin)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    state = "calibrated, polynomial mode" if calibrate is not None else "exact mode; recipes/your_own/README.md trains and calibrates it"
    console.print(f"{out}: {type(model).__name__}, {attention_kernel}, {sum(p.numel() for p in model.parameters()):,} parameters, {state}")


if __name__ == "__main__":
    typer.run(convert)
