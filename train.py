"""Trains the stages of an experiment: python train.py experiment=NAME [overrides]; see docs/train.md."""

from ldm.commands.train import main

if __name__ == "__main__":
    main()
