"""Measurements of the native engine beside its peers, every library in a process and environment of its own, in turns."""
