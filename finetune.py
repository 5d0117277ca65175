"""Fine-tune a timm model: ``flowaug finetune`` as a script."""

if __name__ == "__main__":
    from flowaug.cli.train import run_script

    run_script("finetune", prog="finetune.py")
