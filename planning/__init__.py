"""What a run will take, before it starts: of one device, and of many GPUs (`--plan`)."""
