"""Fine-tune a timm model, with or without flow augmentation.

    flowaug finetune --flow-aug                            # embedded digits and their bundled flow, under a minute
    flowaug finetune --data-dir photos/ --flow-aug         # trains a flow first and keeps it
    accelerate launch -m flowaug finetune --model eva02_base_patch14_448 --data-dir photos/ --flow-aug runs/flow

Labels stay hard and the loss stays as it is. Options that are not given come from the recipe of the data set.
"""

import contextlib
import dataclasses
import json
import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from tqdm.auto import tqdm

from flowaug.data.loaders import endless_batches
from flowaug.data.transforms import DataConfig, Preprocess
from flowaug.data.wds.dataset import count_skipped
from flowaug.evaluation.real_labels import RealLabels
from flowaug.files import file_digest
from flowaug.mixup.transform import FlowMixupTransform
from flowaug.training.classifier import (
    StepPlan,
    accuracy,
    constructor_options,
    create_classifier,
    create_loss,
    create_optimizer,
    create_schedule,
    memory_format,
    write_classifier,
)
from flowaug.training.dry_run import classifier_plan
from flowaug.training.flow_source import describe_flow, digest_of_flow, load_flow_mixup
from flowaug.training.logs import MetricsLog, RunningMean, describe_results
from flowaug.training.options import FinetuneOptions
from flowaug.training.options.command_line import parse_options
from flowaug.training.pipeline import (
    BatchPipeline,
    create_copies,
    create_loaders,
    create_pipeline,
    draw_before_after,
    seed_step,
)
from flowaug.training.resume import TrainingState, exclusive_folder, is_finished, mark_finished
from flowaug.training.runtime import (
    StoppedError,
    StopRequest,
    compare_processes,
    create_accelerator,
    keep_freed_memory,
    one_sentence_errors,
    start_tracking,
    sum_over_processes,
)


class Training:
    """A classifier in training: the state that changes from step to step, and the steps.

    Args:
        options: options.
        accelerator: devices and processes.
        model: the classifier at its start.
        pipeline: the augmentation of batches.
        loaders: of training and validation images.
        flow_mixup: the flow augmentation, or None.
        real: ReaL labels of the validation images, or None.
        identity: what decides the results, see `TrainingState`.
    """

    def __init__(
        self,
        options: FinetuneOptions,
        accelerator: Accelerator,
        model: nn.Module,
        pipeline: BatchPipeline,
        loaders: tuple,
        flow_mixup: FlowMixupTransform | None,
        real: RealLabels | None,
        identity: dict[str, Any],
    ):
        training, transforms, output = options.training, options.transforms, options.run.output
        self.options, self.training, self.accelerator = options, training, accelerator
        self.pipeline, self.flow_mixup, self.real, self.loaders = pipeline, flow_mixup, real, loaders
        self.device, self.main = accelerator.device, accelerator.is_main_process
        self.format = memory_format(options.classifier.channels_last)
        self.plan = StepPlan(training, len(loaders[0]))
        self.steps = self.plan.steps
        optimizer = create_optimizer(model, training, options.schedule)
        self.scheduler = create_schedule(optimizer, options.schedule, self.steps)
        self.criterion = create_loss(transforms.mixes, transforms.smoothing)
        model = model.to(self.device).to(memory_format=self.format)
        decay = training.model_ema_decay
        self.averaged = ModelEmaV3(model, decay=decay, use_warmup=True) if training.model_ema else None

        track = start_tracking(accelerator, "finetune", options.training_options())
        self.log = MetricsLog(output, self.main, track)
        self.mean_loss = RunningMean(self.device)
        parts = (model, self.averaged, optimizer, accelerator.scaler, self.log, self.mean_loss, flow_mixup)
        self.state = TrainingState(output, identity, *(part for part in parts if part is not None))
        self.start = self.state.restore(self.steps, accelerator.print) if options.run.resume == "auto" else 0
        compare_processes(self.start, "steps to resume from")
        if self.start:
            accelerator.print(f"resuming {output} at step {self.start} of {self.steps}")
        if options.classifier.torchcompile:
            model.compile()
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.began = time.time()

    def run(self) -> None:
        """Take all remaining steps."""
        stream = endless_batches(self.loaders[0], self.plan.batches_before(self.start))
        self.model.train()
        hidden = not self.main
        bar = tqdm(total=self.steps, initial=self.start, unit="step", disable=hidden, dynamic_ncols=True)
        with bar, StopRequest(self.accelerator) as stop:
            for step in range(self.start, self.steps):
                with self.state.saved_on_stop(step, stop):
                    self.take_step(step, stream)
                bar.update()
                self.after_step(step + 1, bar, stop.after_step(step + 1))

    def take_step(self, step: int, stream: Iterator) -> None:
        """Update the weights once."""
        epoch, per_epoch = step // self.plan.per_epoch, self.plan.per_epoch
        on_epochs = self.options.schedule.sched_on_epochs
        self.scheduler.step(epoch * per_epoch if on_epochs else step)
        parts = self.plan.batches_of(step)
        self.mean_loss.update(self.backward(self.batches(stream, step, epoch, parts), parts))
        self.accelerator.clip_grad_norm_(self.model.parameters(), self.training.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.averaged is not None:
            self.averaged.update(self.accelerator.unwrap_model(self.model), step=step)

    def batches(self, stream: Iterator, step: int, epoch: int, parts: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the augmented batches of one step; the randomness of each depends on its number alone."""
        for part in range(parts):
            seed_step(self.training.seed, step, part, self.accelerator.process_index, self.pipeline.flow_mixup)
            x, y = next(stream)
            x, y = self.pipeline(x.to(self.device), y.to(self.device), epoch)
            yield x.contiguous(memory_format=self.format), y

    def backward(self, batches: Iterable[tuple[Tensor, Tensor]], parts: int) -> Tensor:
        """Accumulate the gradients of a step, exchanged between processes in its last pass; return the mean loss."""
        losses = []
        for part, (x, y) in enumerate(batches, 1):
            with contextlib.nullcontext() if part == parts else self.accelerator.no_sync(self.model):
                losses.append(self.criterion(self.model(x), y))
                self.accelerator.backward(losses[-1] / parts)
        return torch.stack([loss.detach() for loss in losses]).mean()

    def after_step(self, done: int, bar: tqdm, signum: int) -> None:
        """Evaluate and save after ``done`` steps, where it is due, and stop if a signal asks for it.

        Raises:
            StoppedError: ``signum`` is not 0; the state is saved.
        """
        if self.plan.is_evaluated(done):
            evaluated = self.model if self.averaged is None else self.averaged.module
            preprocess, reduce = self.pipeline.preprocess, sum_over_processes(self.accelerator)
            values = accuracy(evaluated, self.loaders[1], preprocess, self.device, reduce, self.real)
            self.log.write(done, {"train_loss": self.mean_loss.read(), **values}, bar)
        if (done % self.options.run.save_every == 0 or done == self.steps or signum) and self.main:
            self.state.save(done)
        if signum:
            raise StoppedError(signum, done)

    def finish(self, dataset, model_args: dict[str, Any], config: DataConfig) -> dict:
        """Write weights, curves, the before/after grid and the summary; return the summary."""
        output, seconds = self.options.run.output, time.time() - self.began
        model = self.options.classifier.model
        if self.main:
            final = self.accelerator.unwrap_model(self.model) if self.averaged is None else self.averaged.module
            write_classifier(output, final, model_args, config, dataset.class_names)
        if self.flow_mixup is not None:
            self.log.note("flow_aug", self.flow_mixup.counts)
        summary = self.log.finish(model=model, seconds=round(seconds, 1), steps=self.log.last["step"])
        if self.main:
            self.log.plot(["train_loss", "top1"], f"{model} on {dataset.name}")
            if self.flow_mixup is not None:
                draw_before_after(self.flow_mixup, dataset, config, output / "augmented.png")
            mark_finished(output, self.state.identity)
            self.state.discard()
        return summary


def run_identity(options: FinetuneOptions, train_set, val_set, num_processes: int) -> dict[str, Any]:
    """Return what decides the results of a run, as JSON values."""
    return {
        "options": options.training_options(),
        "training set": train_set.fingerprint(),
        "validation set": val_set.fingerprint(),
        "flow": digest_of_flow(options, train_set),
        "policy": file_digest(options.flow_aug.flow_aug_policy),
        "checkpoint": file_digest(options.classifier.checkpoint),
        "number of processes": num_processes,
    }


def finetune(options: FinetuneOptions, accelerator: Accelerator) -> dict | None:
    """Train, evaluate and write the output folder; return the summary, or None after ``--dry-run``.

    Raises:
        ValueError: options, data, flow or weights that cannot be used, or an output folder with another run.
        FileNotFoundError: data, flow or weights are not there.
        StoppedError: a signal asked the training to stop.
    """
    precision = accelerator.mixed_precision
    options = dataclasses.replace(options, training=dataclasses.replace(options.training, amp=precision))
    training, run = options.training, options.run
    train_set, val_set = (options.data.open(split) for split in ("train", "val"))
    num_classes, process = len(train_set.class_names), (accelerator.process_index, accelerator.num_processes)
    labels = options.classifier.real_labels
    real = RealLabels(labels, val_set, *process) if labels else None
    set_seed(training.seed)
    model, config = create_classifier(options.classifier, num_classes, train_set.channels, not run.dry_run)
    loaders = create_loaders(train_set, val_set, config, options.transforms, training, run.workers, accelerator)
    plan, flow = StepPlan(training, len(loaders[0])), describe_flow(options, train_set)
    accelerator.print(classifier_plan(options, model, config, (train_set, val_set), plan, flow, accelerator))
    if run.dry_run:
        return None
    if is_finished(run.output, run_identity(options, train_set, val_set, accelerator.num_processes), run.overwrite):
        accelerator.print(f"finished already: {run.output}; pass --overwrite to train again")
        return json.loads((run.output / "metrics.json").read_text(encoding="utf-8"))

    flow_mixup = load_flow_mixup(options, train_set, accelerator)
    identity = run_identity(options, train_set, val_set, accelerator.num_processes)
    with exclusive_folder(run.output, accelerator.is_main_process):
        loaders, on_batches = add_flow_mixup(options, train_set, val_set, loaders, flow_mixup, config, accelerator)
        preprocess = Preprocess(config.input_size, config.mean, config.std)
        off_epoch = options.flow_aug.flow_aug_off_epoch
        pipeline = create_pipeline(
            preprocess, options.transforms, num_classes, accelerator.device, on_batches, off_epoch
        )
        trainer = Training(options, accelerator, model, pipeline, loaders, flow_mixup, real, identity)
        trainer.run()
        if skipped := count_skipped({"train": train_set, "val": val_set}, gather_object):
            trainer.log.note("skipped", skipped)
        return trainer.finish(val_set, constructor_options(options.classifier, num_classes, train_set.channels), config)


def add_flow_mixup(
    options: FinetuneOptions,
    train_set,
    val_set,
    loaders: tuple,
    flow_mixup: FlowMixupTransform | None,
    config: DataConfig,
    accelerator: Accelerator,
) -> tuple[tuple, FlowMixupTransform | None]:
    """Return the loaders, of offline copies if the options ask for them, and the flow mixup of batches, or None."""
    if flow_mixup is None or not options.flow_aug.flow_aug_copies:
        return loaders, flow_mixup
    copies = create_copies(
        train_set,
        flow_mixup,
        options.flow_aug,
        options.transforms,
        config,
        options.training.seed,
        accelerator.process_index,
        accelerator.num_processes,
        sum_over_processes(accelerator),
    )
    loading = (config, options.transforms, options.training, options.run.workers, accelerator)
    return create_loaders(copies, val_set, *loading), None


def main(argv: list[str] | None = None, prog: str = "flowaug finetune") -> None:
    """Run the command; end with one sentence and exit code 1 on an error."""
    with one_sentence_errors(prog):
        options = parse_options(FinetuneOptions, argv, prog, __doc__)
        keep_freed_memory()
        run = options.run
        accelerator = create_accelerator(run.cpu, run.log_with, run.output, options.training.amp)
        summary = finetune(options, accelerator)
        if summary is None:
            return
        can_copy = options.flow_aug.flow_aug_copies is None and not options.streamed
        accelerator.print(describe_results(run.output, summary, can_copy))
        accelerator.end_training()
