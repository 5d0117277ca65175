"""Train a flow: ``flowaug train-flow`` as a script."""

if __name__ == "__main__":
    from flowaug.cli.train import run_script

    run_script("train-flow", prog="train_flow.py")
