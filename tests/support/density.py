"""Prints how densely each of the named files is written: see figures.py, which counts the whole program.

python tests/support/density.py model.py lora.py
"""

import ast
import sys
from pathlib import Path

from figures import LONG, WITHOUT_TEXT, code_lines


def main() -> None:
    print(f"{'file':36}{'code lines':>12}{'nodes a code line':>20}{f'over {LONG} columns':>20}{'comment lines':>16}")
    for name in sys.argv[1:]:
        source = Path(name).read_text(encoding="utf-8")
        lines = source.splitlines() or [""]
        code = max(1, len(code_lines(source)))
        nodes = sum(not isinstance(node, WITHOUT_TEXT) for node in ast.walk(ast.parse(source)))
        long = sum(len(line) > LONG for line in lines) / len(lines)
        comments = sum("#" in line and line.lstrip().startswith("#") for line in lines) / len(lines)
        print(f"{name:36}{code:12}{nodes / code:20.2f}{long:20.1%}{comments:16.1%}")


if __name__ == "__main__":
    main()
