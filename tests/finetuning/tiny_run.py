"""Examples and options of a run of the tiny model."""

from tiny_model import SENTENCES

from hf_he.data import TextDataset

DATA = TextDataset("mr", "train", tuple(SENTENCES * 3), None, tuple([1, 0, 1, 0, 1] * 3))
OPTIONS = {
    "backend": "simulator", "max_steps": 2, "per_device_train_batch_size": 10, "target_modules": ("query", "value"), "learning_rate": 4e-3,
    "report_to": "none", "disable_tqdm": True,
}  # fmt: skip
