"""Fine-tune a timm model: ``flowaug finetune`` as a script."""

from flowaug.cli.threads import set_up_threads

set_up_threads()  # before the import of torch

from flowaug.training.finetune import Training, main  # noqa: E402, F401

if __name__ == "__main__":
    main(prog="finetune.py")
