"""Fine-tune a timm model: ``flowaug finetune`` as a script."""

from flowaug.training.finetune import Training, main

__all__ = ["Training", "main"]

if __name__ == "__main__":
    main(prog="finetune.py")
