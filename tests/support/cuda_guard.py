"""Builds the guard that lets fake CUDA tensors live: `python cuda_guard.py FOLDER` writes FOLDER/cuda_guard.so."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path


def build_guard(folder: Path) -> Path:
    """Compiles cuda_guard.cpp against this environment's torch; raises where there is no C++ compiler."""
    torch_folder = importlib.util.find_spec("torch").submodule_search_locations[0]
    library = Path(folder) / "cuda_guard.so"
    compiler = os.environ.get("CXX", "g++")
    command = [compiler, "-O1", "-shared", "-fPIC", "-std=c++20", f"-I{torch_folder}/include"]
    command += [str(Path(__file__).with_suffix(".cpp")), "-o", str(library)]
    command += [f"-L{torch_folder}/lib", f"-Wl,-rpath,{torch_folder}/lib", "-lc10", "-ltorch_cpu"]
    subprocess.run(command, check=True)
    return library


if __name__ == "__main__":
    build_guard(Path(sys.argv[1]))
