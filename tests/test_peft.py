"""`HELoraConfig`: what has no encrypted form is refused by name."""

import pytest

from hf_he.errors import ParameterError
from hf_he.peft import HELoraConfig


@pytest.mark.parametrize(
    "setting",
    [
        {"lora_alpha": 8, "r": 4}, {"lora_dropout": 0.1}, {"use_rslora": True}, {"use_dora": True}, {"bias": "all"}, {"rank_pattern": {"query": 1}},
        {"init_lora_weights": "pissa"}, {"target_parameters": ["weight"]}, {"trainable_token_indices": [1]}, {"layer_replication": [(0, 1)]},
        {"alora_invocation_tokens": [1]}, {"use_qalora": True}, {"r": 0},
    ],
    ids=str,
)  # fmt: skip
def test_settings_without_an_encrypted_form(setting):
    with pytest.raises(ParameterError, match=next(iter(setting))):
        HELoraConfig(**setting)


def test_initialisers_that_leave_the_model_as_it_is():
    for initialiser in (True, False, "gaussian", "orthogonal"):
        assert HELoraConfig(r=4, init_lora_weights=initialiser).lora_alpha == 4
