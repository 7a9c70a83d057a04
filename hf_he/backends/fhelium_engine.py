"""FHElium's engine for a parameter set, and where it runs."""

from __future__ import annotations

from typing import Any

import torch

from hf_he.ckks.parameters import ERROR_STANDARD_DEVIATION, CKKSParameters
from hf_he.errors import BackendUnavailableError

GALOIS_GENERATOR = 5
"""Slot j is the evaluation at the 5^j-th power of the root, as in hf_he.ckks."""


def make_engine(parameters: CKKSParameters) -> Any:
    """FHElium's engine for the ciphertext moduli of `parameters`, without those of bootstrapping."""
    from fhelium import CkksConfig
    from fhelium.eager import Engine

    config = CkksConfig(
        default_scale=2.0**parameters.scale_bits,
        q_depth_groups=tuple((q,) for q in reversed(parameters.moduli)),
        p_moduli=parameters.special_moduli,
        logN=parameters.ring_degree.bit_length() - 1,
        sigma=ERROR_STANDARD_DEVIATION,
        enforce_security_budget=not parameters.insecure,
        galois_generator=GALOIS_GENERATOR,
    )
    return Engine(config)


def prepared(engine: Any, plain: Any, moduli: torch.Tensor, basis: str = "Q") -> Any:
    """FHElium's plaintext of integer coefficients [*batch, N] as an operand of sums and products; `moduli` are all of the basis, in FHElium's order.

    Its own preparation asks for the largest coefficient first, for which a card would be waited for at each plaintext.
    """
    from fhelium.values import Plaintext

    standard = Plaintext._from_fields(
        message=None,
        depth=plain.depth,
        scale=plain.scale,
        data=plain.data[..., None, :].remainder(moduli[plain.depth :, None]),
        representation="rns",
        polynomial_domain="coefficient",
        modulus_basis=basis,
        residue_representation="standard",
        prime_ids=tuple(range(plain.depth, len(moduli))),
    )
    return engine.coefficient_domain_to_ntt_domain(engine.standard_residues_to_montgomery_residues(standard))


def choose_device(name: str | None) -> torch.device:
    """By default CUDA where torch and FHElium both have it."""
    from fhelium.native.runtime import native_backend_available

    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    device = torch.device(name or ("cuda" if devices and native_backend_available("cuda") else "cpu"))
    if device.type == "cuda" and device.index is None and devices:
        device = torch.device("cuda", torch.cuda.current_device())
    if device.type == "cpu":
        return device
    if (device.index or 0) >= devices:
        found = f"torch finds {devices} CUDA devices" if devices else "torch finds no CUDA device"
        raise BackendUnavailableError(f"{found}: use --device cpu, or a machine with a GPU and a CUDA build of torch (recipes/backends)")
    if not native_backend_available("cuda"):
        raise BackendUnavailableError(
            "FHElium was compiled for the CPU only: use --device cpu, or compile it again with `make install-fhelium FHELIUM_BACKENDS=CPU+CUDA`"
        )
    return device
