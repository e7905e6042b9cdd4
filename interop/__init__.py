"""Other people's files: the Hugging Face Hub, GGUF, and what `--model` may name."""
