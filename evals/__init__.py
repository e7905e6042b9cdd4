"""One file a kind of evaluation; evaluate.py runs them."""
