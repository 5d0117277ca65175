"""Train a conditional normalizing flow for flow augmentation.

    flowaug train-flow                                     # embedded digits, about a minute on a laptop
    flowaug train-flow --dataset fashion_mnist --output runs/fashion
    accelerate launch -m flowaug train-flow --data-dir photos/ --output runs/photos

The schedule is that of Enescu & Sahbi (NFPI): initialise on data, warm up under one unit Gaussian, solve once for the
class Gaussians by fixed-point iteration, then train by maximum likelihood. Options that are not given come from the
recipe of the data set.
"""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm.auto import tqdm

from flowaug.data.wds.dataset import StreamDataset, count_skipped
from flowaug.evaluation.oracle import Oracle, load_teacher
from flowaug.evaluation.pictures import draw_progress
from flowaug.files import file_digest
from flowaug.flows.checkpoint import WEIGHTS, flow_digest
from flowaug.flows.flow import Flow
from flowaug.flows.passes import AveragedFlow, ImageTable, evaluate, fit_pca, reduced
from flowaug.latents.moments import ClassMoments
from flowaug.training.dry_run import flow_plan
from flowaug.training.flow_batches import FlowBatches, augment
from flowaug.training.flow_folder import write_flow_folder
from flowaug.training.flow_setup import create, fit_schedule, initialise, learning_rate, read_table
from flowaug.training.gaussian_schedule import GaussianSchedule
from flowaug.training.logs import MetricsLog, chance_warning
from flowaug.training.optimizers import flow_optimizer
from flowaug.training.options import TrainFlowOptions
from flowaug.training.options.command_line import parse_options
from flowaug.training.resume import TrainingState, exclusive_folder, is_finished, mark_finished
from flowaug.training.runtime import (
    StoppedError,
    StopRequest,
    compare_processes,
    create_accelerator,
    keep_freed_memory,
    one_sentence_errors,
    prepare_in_float32,
    requested_precision,
    shell_command,
    start_tracking,
    sum_over_processes,
)


class FlowTraining:
    """A flow in training: the state that changes from step to step, and the steps.

    Args:
        options: options whose schedule fits the data (`fit_schedule`).
        accelerator: devices and processes.
        flow: the initialised flow.
        batches: the training batches.
        val: validation images.
        teachers: classifiers whose soft labels the classification term learns, alternating by step; none for the
            labels themselves.
        identity: what decides the results, see `TrainingState`.
    """

    def __init__(
        self,
        options: TrainFlowOptions,
        accelerator: Accelerator,
        flow: Flow,
        batches: FlowBatches,
        val: ImageTable,
        teachers: Sequence[Oracle],
        identity: dict[str, Any],
    ):
        training = options.training
        self.options, self.training, self.accelerator = options, training, accelerator
        self.batches, self.table, self.val = batches, batches.table, val
        self.device, self.main = accelerator.device, accelerator.is_main_process
        self.flow, self.teachers = flow.to(self.device), [teacher.to(self.device) for teacher in teachers]
        self.averaged = AveragedFlow(flow, training.ema_decay, training.swa_from)
        self.dtype = getattr(torch, training.conditioner_dtype)
        flow.set_training_form(self.dtype, training.grad_checkpointing, training.torchcompile)
        self.optimizer = flow_optimizer(flow, training.opt, training.lr)

        self.reduce = sum_over_processes(accelerator)
        output, track = options.run.output, start_tracking(accelerator, "train_flow", options.training_options())
        self.log = MetricsLog(output, self.main, track)
        self.schedule = GaussianSchedule(
            options.gaussians, training.steps, training.seed, self.table, self.reduce, flow
        )
        parts = (flow, self.averaged, self.optimizer, self.log, self.schedule)
        self.state = TrainingState(output, identity, *parts)
        auto, steps = options.run.resume == "auto", training.steps
        self.start = self.state.restore(steps, accelerator.print) if auto else 0
        compare_processes(self.start, "steps to resume from")
        if self.start:
            accelerator.print(f"resuming {output} at step {self.start} of {steps}")
        self.model, self.generator = prepare_in_float32(accelerator, flow), torch.Generator(self.device)
        self.began = time.time()

    def run(self) -> None:
        """Take all remaining steps."""
        if self.start == 0:
            self.set_gaussians(0)
        batches = self.batches.phases(self.schedule.phases(), self.start)
        steps, hidden = self.training.steps, not self.main
        bar = tqdm(total=steps, initial=self.start, unit="step", disable=hidden, dynamic_ncols=True)
        with bar, StopRequest(self.accelerator) as stop:
            for step, batch in enumerate(batches, self.start):
                loss = self.take_step(step, *batch)
                self.set_gaussians(step + 1)
                self.after_step(step + 1, loss, bar, stop.after_step(step + 1))
                bar.update()

    def take_step(self, step: int, x: Tensor, y: Tensor) -> Tensor:
        """Update the weights once; return the loss."""
        self.generator.manual_seed((self.training.seed << 40) + (step << 12) + self.accelerator.process_index)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, self.training)

        x, y = augment(x.to(self.device), self.options.transforms, self.generator), y.to(self.device)
        soft = self.soft_labels(step, x)
        x = self.flow.dequantise(x, self.generator)
        log_prob = self.model(x, y, self.options.gaussians.posterior_weight, soft)
        loss = self.flow.bits_per_dim(log_prob).mean()

        loss.backward()  # not the accelerator's, which scales the loss for fp16
        self.accelerator.clip_grad_norm_(self.model.parameters(), self.training.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.averaged.update(self.flow, step=step)
        return loss

    def soft_labels(self, step: int, x: Tensor) -> Tensor | None:
        """Return a teacher's probabilities (B, K) for images (B, C, H, W) in [0, 1]; None without a teacher.

        Several teachers alternate: the loss is linear in the probabilities, so its mean over the teachers is the loss
        of their mean.
        """
        if not self.teachers:
            return None
        teacher = self.teachers[step % len(self.teachers)]
        return teacher.probabilities(x, bool(self.options.transforms.hflip), self.dtype)

    def set_gaussians(self, done: int) -> None:
        """Set the class Gaussians, also of the averaged flow, if they are due after ``done`` steps."""
        if note := self.schedule.after(done, self.flow):
            self.log.note("class_gaussians", note)
            self.averaged.module.gaussians.load_state_dict(self.flow.gaussians.state_dict())

    def after_step(self, done: int, loss: Tensor, bar: tqdm, signum: int) -> None:
        """Evaluate, draw and save after ``done`` steps, where it is due, and stop if a signal asks for it.

        Raises:
            StoppedError: ``signum`` is not 0; the state is saved.
        """
        last = done == self.training.steps
        if done % self.training.eval_every == 0 or last:
            values = evaluate(self.averaged.module, self.val, self.device, self.reduce)
            self.log.write(done, {"train_loss": loss.item(), **values}, bar)
            if self.main and not last:
                draw_progress(self.averaged.module, self.table, self.val, self.options.run.output)
        if (done % self.options.run.save_every == 0 or last or signum) and self.main:
            self.state.save(done)
        if signum:
            raise StoppedError(signum, done)

    def finish(self, dataset) -> None:
        """Fit moments and class principal components to the averaged flow and write its folder."""
        options, table, reduce = self.options, self.table, self.reduce
        final = self.averaged.module.eval()
        moments = ClassMoments.zeros(table.num_classes, final.dim, self.device)
        partners = options.flow.partners_per_class
        pca = fit_pca(final, table, self.device, options.flow.rank, partners, reduce, moments)
        moments = reduced(moments, reduce)
        self.log.note("train_seconds", round(time.time() - self.began, 1))
        if warning := chance_warning(self.log.last["nf_acc"], self.val.targets, table.num_classes):
            self.log.note("warning", warning)
            self.accelerator.print(f"warning: {warning}")
        if self.main:
            decisive = options.training_options()
            write_flow_folder(options.run.output, final, pca, moments, dataset, table, self.val, decisive, self.log)
            mark_finished(options.run.output, self.state.identity)
            self.state.discard()
        self.accelerator.wait_for_everyone()


def run_identity(options: TrainFlowOptions, train_set, val_set, num_processes: int) -> dict[str, Any]:
    """Return what decides the results of a run, as JSON values."""
    teachers = [path / WEIGHTS for path in map(Path, options.gaussians.teacher or ()) if path.is_dir()]
    return {
        "options": options.training_options(),
        "training set": train_set.fingerprint(),
        "validation set": val_set.fingerprint(),
        "initial flow": flow_digest(options.flow.init_from) if options.flow.init_from else None,
        "teacher": [file_digest(path) for path in teachers],
        "number of processes": num_processes,
    }


def train_flow(options: TrainFlowOptions, accelerator: Accelerator) -> Path | None:
    """Train a flow and write its folder; return the folder, or None after ``--dry-run``.

    Raises:
        ValueError: options or data that cannot be used.
        FileNotFoundError: data, teacher or initial flow are not there.
    """
    sets = {split: options.data.open(split) for split in ("train", "val")}
    options = fit_schedule(options, len(sets["train"]), accelerator.num_processes)
    _check_streams(options, sets["train"])
    flow = create(options.flow, sets["train"], options.training.seed)
    accelerator.print(flow_plan(options, flow, sets["train"], len(sets["val"]), accelerator))
    if (precision := requested_precision(accelerator)) != "no":
        accelerator.print(f"mixed precision {precision} does not apply to the flow: its exact inverse needs float32")
    if options.run.dry_run:
        return None
    identity = run_identity(options, sets["train"], sets["val"], accelerator.num_processes)
    if is_finished(options.run.output, identity, options.run.overwrite):
        accelerator.print(f"finished already: {options.run.output}; pass --overwrite to train again")
        return options.run.output
    teachers = [load_teacher(name, sets["train"]) for name in options.gaussians.teacher or ()]
    with exclusive_folder(options.run.output, accelerator.is_main_process):
        if is_finished(options.run.output, identity, options.run.overwrite):
            accelerator.print(f"finished by another run meanwhile: {options.run.output}")
            return options.run.output
        table, val = (read_table(data, sets["train"], options.flow.image_size, accelerator) for data in sets.values())
        initialise(flow, table, options)
        training = options.training
        batches = FlowBatches(
            sets["train"], table, options.transforms, training.batch_size, training.seed, options.run.workers
        )
        run = FlowTraining(options, accelerator, flow, batches, val, teachers, identity)
        run.run()
        if skipped := count_skipped(sets):
            run.log.note("skipped", skipped)
        run.finish(sets["train"])
    return options.run.output


def _check_streams(options: TrainFlowOptions, train) -> None:
    streamed = isinstance(train, StreamDataset) and options.uses_timm_transforms
    if options.gaussians.estimator == "glem" and streamed:
        raise ValueError(
            "--estimator glem needs random access to images, which webdataset shards with timm's transforms do not "
            "have; leave out --estimator glem, or --scale, --ratio, --aa and --color-jitter"
        )


def next_command(options: TrainFlowOptions, folder: Path) -> str:
    """Return the command that fine-tunes a classifier with a trained flow on the same data."""
    data = {item.name: getattr(options.data, item.name) for item in dataclasses.fields(options.data)}
    defaults = {item.name: item.default for item in dataclasses.fields(options.data)}
    given = [(f"--{name.replace('_', '-')}", value) for name, value in data.items() if value != defaults[name]]
    return shell_command("finetune", *(part for pair in given for part in pair), "--flow-aug", folder)


def main(argv: list[str] | None = None, prog: str = "flowaug train-flow") -> None:
    """Run the command; end with one sentence and exit code 1 on an error."""
    with one_sentence_errors(prog):
        options = parse_options(TrainFlowOptions, argv, prog, __doc__)
        keep_freed_memory()
        accelerator = create_accelerator(options.run.cpu, options.run.log_with, options.run.output, "no")
        folder = train_flow(options, accelerator)
        if folder is not None:
            accelerator.print(f"flow written to {folder}; next: {next_command(options, folder)}")
        accelerator.end_training()
