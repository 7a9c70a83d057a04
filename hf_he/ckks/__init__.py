"""The native RNS-CKKS engine: parameters, float64 kernels, encoder, keys, evaluator. No model code, no packing."""

import os

# A kernel is a chain of short parallel loops. GNU OpenMP's default is to spin between them, which takes the core that another process
# (or the other half of the loop) is waiting for: measured on two busy cores, a rotation takes 71 ms with the default and 5 ms without.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
