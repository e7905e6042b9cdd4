"""Runs train.py's jobs one after the other in the processes of one torchrun: argv[1] is a JSON list of their words. (A
process's imports take longer than a small job.)"""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

import checkpoint
import distributed
import train
from common.errors import run

if "FULL_DISK" in os.environ:  # for the first file that a model's folder gets
    written, fails = checkpoint.write_json, [True]

    def write_json(value, path):
        if fails and path.name == "config.json":
            fails.pop()
            raise OSError(28, "No space left on device", str(path))
        written(value, path)

    checkpoint.write_json = write_json
torch.set_num_threads(1)
if "NODES" in os.environ:  # processes that are to believe in several machines
    os.environ["LOCAL_WORLD_SIZE"] = str(int(os.environ["WORLD_SIZE"]) // int(os.environ["NODES"]))
distributed.destroy_process_group = lambda: (
    None
)  # a second group of the same processes would mistake the first one's keys in the store
with distributed.safe_exit():
    for job in json.loads(sys.argv[1]):
        sys.argv = ["train.py", *map(str, job)]
        stdout = sys.stdout
        run(train.main)
        sys.stdout = stdout
