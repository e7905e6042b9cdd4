"""From files of examples to token rows in the order of training."""
