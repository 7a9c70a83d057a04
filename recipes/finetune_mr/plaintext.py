"""What encrypted fine-tuning is compared with: stock PEFT LoRA and torch's AdamW on the exact functions, with the recipe's data order and initial adapter.

python recipes/finetune_mr/plaintext.py --seed 0                            # plaintext LoRA, scored in exact mode
python recipes/finetune_mr/plaintext.py --adapter out/run                   # the adapter of a finished `hf-he finetune`, scored in polynomial mode
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tqdm.auto import tqdm
from transformers import AutoTokenizer, get_scheduler

from hf_he.checkpoints import load_classifier
from hf_he.data import load_dataset
from hf_he.errors import DataError
from hf_he.evaluation import encode_texts, evaluate_model
from hf_he.finetuning.order import DataOrder
from hf_he.finetuning.recipe import FinetuneRecipe
from hf_he.training.recipe import load_recipe


def train(recipe, tokenizer, seed: int, learning_rate: float, max_steps: int) -> tuple[torch.nn.Module, list[float]]:
    """One run in double precision: the model and the loss of every step."""
    torch.manual_seed(seed)
    model = load_classifier(recipe.model_folder).double()
    model.set_mode("exact")
    args = recipe.training_arguments(max_steps=max_steps, seed=seed)
    config = LoraConfig(
        r=args.lora_rank, lora_alpha=args.lora_rank, target_modules=list(args.target_modules), modules_to_save=["classifier"], task_type="SEQ_CLS"
    )
    model = get_peft_model(model, config).eval()
    data = load_dataset(recipe.task, "train", recipe.data_dir).spread(recipe.train_rows)
    order, steps = DataOrder(len(data), args.per_device_train_batch_size, seed), args.total_steps(len(data))
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], learning_rate, weight_decay=args.weight_decay)
    scheduler = get_scheduler(args.lr_scheduler_type, optimizer, args.get_warmup_steps(steps), steps)
    losses = []
    for number in tqdm(range(1, steps + 1), desc="plaintext LoRA"):
        batch = data.select(order.step(number))
        loss = model(**encode_texts(tokenizer, batch), labels=torch.tensor(batch.labels)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    return model, losses


def scores(model: torch.nn.Module, tokenizer, recipe) -> dict[str, float]:
    """Of the splits that there are."""
    found = {}
    for split in ("dev", "test"):
        try:
            data = load_dataset(recipe.task, split, recipe.data_dir)
        except DataError:
            continue
        result = evaluate_model(model, tokenizer, data)
        found |= {split: result.score, f"{split}_outside": result.out_of_range}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path(__file__).with_name("config.yaml"))
    parser.add_argument("--task")
    parser.add_argument("--data-dir")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-steps", type=int, default=-1, help="default: the recipe's one epoch")
    parser.add_argument("--learning-rate", type=float, help="default: the recipe's")
    parser.add_argument("--adapter", type=Path, help="output folder of a finished run: only score it")
    options = parser.parse_args()
    recipe = load_recipe(options.config, FinetuneRecipe, task=options.task, data_dir=options.data_dir)
    tokenizer = AutoTokenizer.from_pretrained(recipe.model_folder, local_files_only=True)
    if options.adapter:
        base = load_classifier(recipe.start_model(options.adapter))
        model = PeftModel.from_pretrained(base, options.adapter / "adapter").eval()
        print(json.dumps({"adapter": str(options.adapter), "mode": "polynomial", **scores(model, tokenizer, recipe)}))
        return
    rate = options.learning_rate or recipe.training_arguments(max_steps=options.max_steps).learning_rate
    model, losses = train(recipe, tokenizer, options.seed, rate, options.max_steps)
    tail = losses[-len(losses) // 5 :]
    measured = {"seed": options.seed, "learning_rate": rate, "steps": len(losses), "loss": sum(tail) / len(tail), "mode": "exact"}
    print(json.dumps({**measured, **scores(model, tokenizer, recipe)}))


if __name__ == "__main__":
    main()
