"""Trains a language model: `python launch.py --config configs/tiny.py [--flag value …]`."""

from jaxlm.launch import leave, main, run_main

if __name__ == "__main__":
    leave(run_main(main))
