"""Text generation on ciphertexts: an encrypted key-value cache, client and server, and `encrypted_generate` for transformers' `generate`."""
