"""Train a conditional normalizing flow: the same as ``flowaug train-flow``."""

from flowaug.training.train_flow import *  # noqa: F403
from flowaug.training.train_flow import main

if __name__ == "__main__":
    main()
