"""Fine-tune a timm model: the same as ``flowaug finetune``."""

from flowaug.training.finetune import *  # noqa: F403
from flowaug.training.finetune import main

if __name__ == "__main__":
    main()
