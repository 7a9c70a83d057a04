"""What the commands of `hf-he` do; `hf_he.cli` imports each on use."""
