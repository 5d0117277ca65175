import pytest

from flowaug.training import finetune, train_flow
from flowaug.training.options import settle_weights
from flowaug.training.recipes import FOLDER

DISAGREE = [
    (["--flow-aug-policy", "p.json"], "--flow-aug-policy needs --flow-aug"),
    (["--flow-aug-off-epoch", "3"], "--flow-aug-off-epoch needs --flow-aug"),
    (["--flow-aug-copies", "3"], "--flow-aug-copies needs --flow-aug"),
    (["--flow-aug-per-axis"], "--flow-aug-per-axis needs --flow-aug"),
    (["--flow-aug-rescaled"], "--flow-aug-rescaled needs --flow-aug"),
    (["--flow-aug-redraws", "2"], "--flow-aug-redraws needs --flow-aug"),
    (["--flow-aug", "--flow-aug-copies", "3", "--flow-aug-off-epoch", "1"], "give one"),
    (["--flow-aug", "--flow-aug-or-aa", "--aa", "rand-m9"], "--flow-aug-or-aa needs --flow-aug-copies"),
    (["--flow-aug", "--flow-aug-copies", "3", "--flow-aug-or-aa"], "--flow-aug-or-aa needs --aa"),
    (["--flow-aug", "--flow-aug-copies", "0"], "--flow-aug-copies must be at least 1"),
    (["--flow-aug", "--flow-aug-copies", "3", "--dataset", "wds/"], "shards are a stream"),
    (["--checkpoint", "w.pth", "--pretrained"], "two sets of weights"),
    (["--mixup-off-epoch", "2"], "needs --mixup or --cutmix"),
    (["--sched", "step", "--lr-cycles", "2"], "no restarts"),
    (["--model-ema-decay", "1.5"], "between 0 and 1"),
    (["--grad-accum-steps", "0"], "at least 1"),
    (["--log-with", "crayon"], "no tracker 'crayon'"),
    (["--log-with", "clearml"], "pip install clearml"),
]


@pytest.mark.parametrize(("options", "message"), DISAGREE)
def test_options_that_disagree_end_before_any_work(options, message, tmp_path):
    with pytest.raises(SystemExit, match=message):
        finetune.main([*options, "--cpu", "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "images", "settled"),
    [
        ([], 2499, True),
        ([], 2500, False),
        (["--flow-aug-per-axis"], 2500, True),
        (["--no-flow-aug-per-axis"], 100, False),
        (["--recipe", str(FOLDER / "eva02_imagenet.yaml")], 100, False),
    ],
)
def test_few_images_of_a_class_take_a_weight_for_each_axis(options, images, settled):
    args = finetune.parse_args(["--flow-aug", *options])
    settle_weights(args, images, num_classes=10)
    assert args.flow_aug_per_axis == settled


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--init-from", "digits", "--model", "jet_tiny"], "decides --model"),
        (["--init-from", "nothing"], "no flow at"),
        (["--anneal-share", "1.5"], "--anneal-share is 1.5; expected more than 0"),
        (["--anneal-share", "0.5", "--lr-schedule", "halving"], "--lr-schedule halving has no --anneal-share"),
        (["--swa-from", "800", "--steps", "800"], "--swa-from 800 is never reached in 800 steps"),
    ],
)
def test_a_flow_that_disagrees_with_the_options(options, message, tmp_path):
    with pytest.raises(SystemExit, match=message):
        train_flow.main([*options, "--cpu", "--output", str(tmp_path / "out")])
