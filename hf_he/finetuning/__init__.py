"""Fine-tuning LoRA adapters on encrypted examples: a client with the data and the secret key, a server with the model and neither."""
