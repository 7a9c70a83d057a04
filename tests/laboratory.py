"""A small encrypted set-up that tests of operations and models share."""

import warnings

import numpy as np
import torch

from hf_he.backends import get_backend
from hf_he.ckks.parameters import CKKSParameters
from hf_he.packing import Packing, pack_attention_mask, pack_embeddings, unpack_state
from hf_he.refresh import ClientRefresh


class Lab:
    """Client and server in one: a backend with keys for `rotations`, a packing of 16 features x 8 tokens, a client that refreshes."""

    def __init__(self, rotations=None, features=16, tokens=8, log2_degree=11, levels=7, backend="simulator", parameters=None):
        from hf_he.tensor import EncryptedSession

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            parameters = parameters or CKKSParameters.from_bits(log2_degree, 50, 40, levels, special_bits=50, special_count=2, insecure=True)
        self.backend = get_backend(backend, parameters)
        self.secret = self.backend.generate_secret_key()
        steps = range(1, parameters.slots) if rotations is None else rotations
        self.backend.load_evaluation_keys(self.backend.generate_evaluation_keys(self.secret, steps))
        self.packing = Packing.fit(parameters.slots, features, tokens)
        self.session = EncryptedSession(self.backend, self.packing, ClientRefresh(self.refresh))
        self.generator = torch.Generator().manual_seed(0)

    def refresh(self, data: bytes) -> bytes:
        ciphertext = self.backend.deserialize(data, "ciphertext")
        return self.backend.serialize(self.backend.encrypt(self.backend.decrypt(ciphertext, self.secret), self.secret))

    def random(self, *shape: int) -> torch.Tensor:
        """Standard normal, double precision."""
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def states(self, features=None) -> torch.Tensor:
        """[B, T, F]"""
        return self.random(self.packing.sequences, self.packing.tokens, features or self.packing.features)

    def encrypt(self, values: torch.Tensor, level=None):
        """[B, T, F] -> EncryptedTensor"""
        ciphertext = self.backend.encrypt(pack_embeddings(values.numpy(), self.packing), self.secret, level)
        return self.session.hidden_state(ciphertext, values.shape[-1])

    def encrypt_mask(self, mask: torch.Tensor):
        return self.session.attention_mask(self.backend.encrypt(pack_attention_mask(mask.numpy(), self.packing), self.secret))

    def decrypt(self, ciphertext, features: int) -> torch.Tensor:
        """[B, T, F]"""
        return torch.from_numpy(np.ascontiguousarray(unpack_state(self.backend.decrypt(ciphertext, self.secret), self.packing, features)))

    def check(self, ciphertext, expected: torch.Tensor, tolerance=1e-6) -> None:
        """Compare with [B, T, F] values, and the scale with the canonical one of the level."""
        torch.testing.assert_close(self.decrypt(ciphertext, expected.shape[-1]), expected.to(torch.float64), atol=tolerance, rtol=0)
        assert abs(ciphertext.scale / self.backend.parameters.scale_at(ciphertext.level) - 1) < 1e-9
