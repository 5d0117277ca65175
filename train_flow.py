"""Train a flow: ``flowaug train-flow`` as a script."""

from flowaug.training.train_flow import FlowTraining, main

__all__ = ["FlowTraining", "main"]

if __name__ == "__main__":
    main(prog="train_flow.py")
