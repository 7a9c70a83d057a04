"""What is timed as the NTT, in a module of its own: `native` is run as a script, which kernels cannot be cached for."""

from __future__ import annotations

from hf_he.ckks import ntt
from hf_he.ckks.jit import kernel


@kernel
def forward_rows(rows, out, scratch, tables):
    """Row k modulo limb k, on the thread that calls: waking the engine's threads takes as long as several transforms."""
    for k in range(rows.shape[0]):
        ntt.forward(rows[k], out[k], scratch, tables, k, True)
