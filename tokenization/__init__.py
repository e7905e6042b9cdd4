"""The parts of a tokenizer: subwords and chat templates."""
