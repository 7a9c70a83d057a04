"""Encrypted forms of torch and hf_he functions, each registered with `hf_he.tensor.handler`. A new one: a function in the file of its subject,
or a new file listed here."""

from hf_he.handlers import attention, decoders, engine, losses, refusals, shapes, states

__all__ = ["attention", "decoders", "engine", "losses", "refusals", "shapes", "states"]
