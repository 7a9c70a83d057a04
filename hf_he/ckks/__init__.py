"""The native RNS-CKKS engine: parameters, float64 kernels, encoder, keys, evaluator. No model code, no packing."""
