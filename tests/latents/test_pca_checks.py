import pytest
import torch

from flowaug import load_pca, save_flow
from flowaug.flows.checkpoint import PCA
from tests.conftest import make_flow, make_pca
from tests.flows.test_weight_file import one_nan, put, rewrite


@pytest.fixture
def folder(tmp_path, flow, pca):
    return save_flow(flow, tmp_path / "flow", pca)


def all_partners_to_the_first_class(offsets):
    return torch.tensor([0, *[int(offsets[-1])] * (len(offsets) - 1)])


CHANGES = [
    (put("axes", lambda t: 3 * t), "axes that are not orthonormal"),
    (put("axes", torch.ones_like), "axes that are not orthonormal"),
    (put("axes", lambda t: t[:, :1].expand_as(t)), "axes that are not orthonormal"),
    (put("axes", one_nan), "not finite"),
    (put("variance", lambda t: -t), "negative variance"),
    (put("variance", lambda t: t.flip(1)), "not in descending order"),
    (put("mean", one_nan), "mean not finite"),
    (put("mean", lambda t: t + 1e30), r"means beyond ±1e\+06"),
    (put("coords", one_nan), "coords not finite"),
    (put("offsets", all_partners_to_the_first_class), "class without samples"),
    (put("offsets", lambda t: t - 5), "offsets must be non-decreasing"),
    (put("coords", lambda t: t.bool()), "coords is BOOL"),
    (put("coords", lambda t: t[0, 0]), "2 dimensions"),
    (put("axes", lambda t: t.bool()), "axes is BOOL"),
    (put("offsets", lambda t: t.float()), "offsets is F32"),
    (put("mean", lambda t: t[:, :-1]), "must have shapes"),
    (lambda tensors: tensors.pop("mean"), "not a saved ClasswisePCA"),
    (lambda tensors: tensors.update(more=torch.zeros(1)), "not a saved ClasswisePCA"),
]


@pytest.mark.parametrize(("change", "message"), CHANGES)
def test_wrong_components_are_named_though_their_digest_is_right(folder, change, message):
    rewrite(folder, change, PCA)
    with pytest.raises(ValueError, match=message) as error:
        load_pca(folder)
    assert PCA in str(error.value)


def test_components_of_another_flow_are_refused(tmp_path, flow):
    other = make_flow(num_classes=2)
    folder = save_flow(flow, tmp_path, make_pca(other))
    with pytest.raises(ValueError, match="for 2 classes and 192 dimensions, expected 3 and 192"):
        load_pca(folder)


def test_components_beyond_the_rank_of_a_class_may_be_zero(tmp_path, flow):
    pca = make_pca(flow, per_class=3, rank=8)
    assert (pca.axes[:, -1] == 0).all()
    assert load_pca(save_flow(flow, tmp_path, pca)).rank == 8
