"""A language-model recipe in miniature: a folder of texts in, polynomial-mode decoders with cards out, and a second run that does nothing."""

import json
import math

import pytest
import torch
import typer
import yaml
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import hf_he
from hf_he.corpora import Document
from hf_he.errors import DataError
from hf_he.nn import RangeTracker
from hf_he.scripts.evaluate import evaluate
from hf_he.scripts.train import train
from hf_he.training.language import LanguagePipeline, new_model
from hf_he.training.language_data import NO_LABEL, BlockDataset, stress_blocks, token_blocks, train_tokenizer
from hf_he.training.language_recipe import LanguageRecipe
from hf_he.training.recipe import load_recipe

STAGE = {"tokens": 8_000, "learning_rate": 8e-3, "batch_size": 8, "warmup": 0.1}
GAUSSIAN = {"attention_kernel": "gaussian_kernel", "initial_score": -1.5}
NORMALIZED = {"attention_kernel": "normalized_gaussian_kernel", "power_softmax_eps": 0.01, "power_softmax_length_agnostic": True, "initial_score": -1.0}
POWER = {"attention_kernel": "power_softmax", "power_softmax_eps": 0.05, "power_softmax_length_agnostic": True, "power_softmax_shift": 0.8}


def run(command, *arguments):
    app = typer.Typer()
    app.command()(command)
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lm")
    (folder / "texts").mkdir()
    for number in range(40):
        sentences = (f"the {('whale', 'ship', 'sea')[(number + i) % 3]} is {('white', 'old', 'deep', 'far')[(number * i) % 4]} and so on." for i in range(30))
        (folder / "texts" / f"{number:02d}.txt").write_text(" ".join(sentences))
    values = {
        "kind": "language-model", "data_dir": str(folder / "texts"), "output_dir": str(folder / "out"), "seeds": [0, 1], "vocabulary": 290, "block": 16,
        "architecture": {"num_layers": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 64},
        "variants": {"softmax": {"attention_kernel": "softmax"}, "gaussian_kernel": GAUSSIAN, "power_softmax": POWER, "normalized_gaussian_kernel": NORMALIZED},
        "convert": ["power_softmax"], "publish": ["gaussian_kernel", "normalized_gaussian_kernel", "power_softmax"], "calibration_rows": 200, "margin": 0.5,
        "degrees": {"norm_newton_steps": 1, "goldschmidt_steps": 2, "squarings": 6, "activations": {"gelu": 15}},
        "pretrain_stage": STAGE, "polynomial_stage": STAGE | {"tokens": 2_000, "learning_rate": 1e-3}, "convert_stage": STAGE | {"tokens": 2_000},
    }  # fmt: skip
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture(scope="module")
def trained(recipe):
    return recipe.parent / "out", run(train, "--config", recipe, "--json")


def test_every_model_learns_in_polynomial_mode_at_equal_tokens(trained):
    _, report = trained
    summary = report["summary"]
    assert set(summary) == {"softmax", "gaussian_kernel", "normalized_gaussian_kernel", "power_softmax", "power_softmax-converted"}
    assert all(entry["mean"] < 6.0 for entry in summary.values()), "290 without knowledge"
    assert summary["softmax"]["tokens"] == summary["gaussian_kernel"]["tokens"] == summary["power_softmax"]["tokens"] == 9_856
    assert summary["softmax"]["ratio_to_softmax"] == 1.0 and len(summary["gaussian_kernel"]["ratios"]) == 2


def test_published_folders_generate_in_polynomial_mode(trained):
    out, report = trained
    for name in ("gaussian_kernel", "normalized_gaussian_kernel", "power_softmax"):
        folder = out / "published" / name
        model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        assert (model.dtype, model.config.mode, type(model)) == (torch.float32, "polynomial", hf_he.HEGPTNeoXForCausalLM)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert len(tokenizer) == model.config.vocab_size == 290
        prompt = tokenizer("the whale is", return_tensors="pt")
        assert model.generate(**prompt, max_new_tokens=6, do_sample=False, eos_token_id=None).shape[1] == prompt["input_ids"].shape[1] + 6
        card = ModelCard.load(folder / "README.md")
        assert card.data.eval_results[0].metric_value == round(report["runs"][name]["0"]["test"]["polynomial"], 3)
        assert ("US 12,647,248 B2" in card.text) == (name != "gaussian_kernel")
        assert "{" not in card.text.replace("```", "")
        assert (folder / "modeling_hf_he.py").is_file()
        own = json.loads((folder / "report.json").read_text())
        assert own["runs"] == {run: report["runs"][run]["0"] for run in ("softmax", name)} and own["summary"][name] == report["summary"][name]


def test_evaluate_gives_the_perplexity_of_the_report(trained, recipe):
    out, report = trained
    folder = out / "published" / "power_softmax"
    arguments = ("--task", "lm", "--model", folder, "--data-dir", recipe.parent / "texts", "--max-length", 16, "--json")
    for mode in ("exact", "polynomial"):
        result = run(evaluate, *arguments, "--mode", mode)
        assert round(result["perplexity"], 4) in [scores["test"][mode] for scores in report["runs"]["power_softmax"].values()]
        assert result["mode"] == mode and 0.0 < result["bits_per_byte"] < result["bits_per_token"]
    assert run(evaluate, *arguments, "--limit", 3)["blocks"] == 3
    encrypted = run(evaluate, *arguments, "--mode", "encrypted", "--backend", "simulator", "--limit", 3)
    assert encrypted["prefixes"] == 3 and encrypted["mse"] < 5e-3 and encrypted["same_next_token"] == 1.0
    with pytest.raises(DataError, match="exceed the model's context of 16"):
        run(evaluate, *arguments, "--max-length", 64)


def test_a_second_run_repeats_only_stages_whose_settings_changed(trained, recipe):
    out, _ = trained
    markers = {path: path.stat().st_mtime_ns for path in out.rglob("stage.json")}
    assert len(markers) == 1 + 2 * 4 * 3 + 3
    other = recipe.with_name("changed.yaml")
    other.write_text(yaml.safe_dump(yaml.safe_load(recipe.read_text()) | {"margin": 0.6, "seeds": [0]}))
    run(train, "--config", other, "--json")
    again = {str(path.parent.relative_to(out)) for path, written in markers.items() if path.stat().st_mtime_ns != written}
    runs = ("gaussian_kernel", "normalized_gaussian_kernel", "power_softmax", "power_softmax-converted")
    assert again == {f"seed0/{run}/{stage}" for run in runs for stage in ("final", "scores")}


def test_other_texts_in_the_same_folder_and_a_damaged_marker_repeat_a_stage(tmp_path):
    def texts(word):
        folder = tmp_path / "texts"
        folder.mkdir(exist_ok=True)
        for number in range(20):
            (folder / f"{number:02d}.txt").write_text(" ".join(f"{word} {number * i}" for i in range(99)))
        started = []
        pipeline = LanguagePipeline(LanguageRecipe(data_dir=str(folder), output_dir=str(tmp_path / "out"), vocabulary=262, block=8), announce=started.append)
        pipeline.text()
        return started, pipeline.tokenizer.decode(pipeline.blocks["train"][0]).split()[0]

    assert [texts(word) for word in ("whale", "whale", "spice")] == [(["text"], "whale"), ([], "whale"), (["text"], "spice")]
    marker = tmp_path / "out" / "text" / "stage.json"
    marker.write_text(marker.read_text()[:40])
    assert [texts("spice") for _ in range(2)] == [(["text"], "spice"), ([], "spice")]


def test_a_full_run_is_not_replaced_by_a_trial(trained, recipe):
    with pytest.raises(DataError, match="full run with max_steps None instead of 2: give another --output-dir"):
        run(train, "--config", recipe, "--max-steps", 2, "--seed", 3)
    assert not (recipe.parent / "out" / "seed3").exists()


def test_max_steps_makes_a_trial_run(recipe, tmp_path):
    report = run(train, "--config", recipe, "--max-steps", 2, "--seed", 3, "--output-dir", tmp_path, "--json")
    assert report["recipe"]["seeds"] == [3]
    assert {entry["tokens"] for entry in report["summary"].values()} == {2 * 2 * 8 * 16}


def test_task_does_not_go_with_a_language_recipe(recipe):
    with pytest.raises(DataError, match="--task belongs to recipes of kind classifier"):
        run(train, "--config", recipe, "--task", "mr")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "vision"}, "kind must be classifier or language-model, not 'vision'"),
        ({"corpora": ["austen"]}, "corpus 'austen' is not one of sotu, moby-dick"),
        ({"variants": {"power": POWER}}, "variants need 'softmax'"),
        ({"variants": {"softmax": {"attention_kernel": "softmax"}, "x": {"attention_kernel": "relu"}}}, "variant x needs an attention_kernel out of softmax"),
        ({"variants": {"softmax": {"attention_kernel": "softmax", "degree": 4}}}, "variant softmax: unknown key 'degree'; known: initial_score"),
        ({"publish": ["softmax"]}, "publish names 'softmax', which is no variant with a polynomial form"),
    ],
)
def test_mistakes_are_named(values, message, recipe, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(recipe.read_text()) | {"convert": [], "publish": []} | values))
    with pytest.raises(DataError, match=message):
        run(train, "--config", path)


def test_tokenizer_encodes_any_text_and_gives_it_back():
    tokenizer = train_tokenizer([Document("a", "the sea and the ship " * 20)], 265, 8)
    text = "Ünïcode — 漢字 and\nlines\n\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.padding_side) == (0, 1, "left")
    with pytest.raises(DataError, match="not 5000"):
        train_tokenizer([Document("a", "the sea")], 5000, 8)


def test_blocks_hold_the_documents_in_order_with_ends_between():
    documents = [Document("a", "the sea and the ship"), Document("b", "a whale")]
    tokenizer = train_tokenizer(documents, 262, 8)
    blocks = token_blocks(tokenizer, documents, 4)
    assert tokenizer.decode(blocks.flatten()) == "the sea and the ship<|endoftext|>a whale<|endoftext|>"[: len(tokenizer.decode(blocks.flatten()))]
    with pytest.raises(DataError, match="fewer than one block of 64"):
        token_blocks(tokenizer, documents[1:], 64)


def test_stress_blocks_alternate_noise_and_cycles():
    blocks = stress_blocks(1000, 20, 32, seed=0)
    assert torch.equal(blocks, stress_blocks(1000, 20, 32, seed=0))
    periods = [min(p for p in range(1, 33) if torch.equal(row[p:], row[:-p])) for row in blocks]
    assert all(period <= 8 for period in periods[1::2]) and all(period > 8 for period in periods[::2])


def test_every_batch_has_its_share_of_stress_rows_without_labels():
    rows = BlockDataset(torch.arange(10).view(5, 2), torch.tensor([[50, 50], [60, 60], [70, 70]]), text_rows=2, stress_rows=1)
    found = [(row["input_ids"][0].item(), row["labels"][0].item()) for row in (rows[i] for i in range(len(rows)))]
    assert found == [(0, 0), (2, 2), (50, NO_LABEL), (4, 4), (6, 6), (60, NO_LABEL)]


@pytest.mark.parametrize(("variant", "statistic"), [(GAUSSIAN, "exponent"), (POWER, "power_mean")])
def test_scores_of_a_fresh_model_start_where_asked(variant, statistic):
    model = new_model(LanguageRecipe(vocabulary=50, block=8), variant).eval()
    with torch.no_grad(), RangeTracker(model) as tracker:
        model(torch.arange(48).view(6, 8))
    seen = tracker.ranges["gpt_neox.layers.1.attention"]
    expected = variant["initial_score"] if statistic == "exponent" else 0.05 + variant["power_softmax_shift"] ** 4
    assert seen.statistic == statistic and seen.minimum < expected < seen.maximum
    assert math.isclose((seen.minimum + seen.maximum) / 2, expected, rel_tol=0.5)


def test_initial_score_of_the_wrong_sign(recipe):
    with pytest.raises(ValueError, match="wrong sign for gaussian_kernel"):
        new_model(load_recipe(recipe, LanguageRecipe), GAUSSIAN | {"initial_score": 1.0})
