"""Trains a language model: `python launch.py --config configs/tiny.py [--flag value …]`."""

import sys

from jaxlm.launch import main, run_main

if __name__ == "__main__":
    sys.exit(run_main(main))
