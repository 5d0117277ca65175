"""Train a flow: ``flowaug train-flow`` as a script."""

from flowaug.cli.threads import set_up_threads

set_up_threads()  # before the import of torch

from flowaug.training.train_flow import FlowTraining, main  # noqa: E402, F401

if __name__ == "__main__":
    main(prog="train_flow.py")
