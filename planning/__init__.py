"""What a run will take, before it starts: memory and time of one device, and of many GPUs (`--plan`)."""
