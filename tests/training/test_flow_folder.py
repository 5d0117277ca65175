"""What a training leaves: the mean loss of the steps since the last reading."""

import torch

from flowaug.training.logs import RunningMean


def mean_of(*losses):
    mean = RunningMean(torch.device("cpu"))
    for loss in losses:
        mean.update(torch.tensor(loss))
    return mean


def test_a_mean_begins_anew_when_it_was_read():
    mean = mean_of(4.0, 2.0)
    assert mean.read() == 3.0
    mean.update(torch.tensor(0.5))
    assert mean.read() == 0.5


def test_a_resumed_mean_goes_on_from_the_losses_not_yet_read():
    resumed = RunningMean(torch.device("cpu"))
    resumed.load_state_dict(mean_of(4.0, 2.0).state_dict())
    resumed.update(torch.tensor(0.0))
    assert resumed.read() == 2.0
