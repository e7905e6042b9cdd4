"""What every other file may use: one-line errors, safe writes, devices, flags, the terminal."""
