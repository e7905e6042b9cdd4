"""What the loop calls between two steps: each file is a named line of `train.train_loop`, or of the
set-up before it."""
