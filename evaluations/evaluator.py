"""The original's evaluation script: python evaluations/evaluator.py REFERENCE SAMPLES."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from guided_diffusion.commands.evaluator import main

if __name__ == "__main__":
    main()
