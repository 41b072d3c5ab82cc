"""Changes to a model, and what is left when they are taken back."""

import torch
from torch import nn

from secateur.graph.changes import Edit, Undo, edit_
from secateur.structure import shrink_
from secateur.targets import Target


class Shared:
    heads = 4


class Holder(nn.Module):
    groups = 2

    def __init__(self) -> None:
        super().__init__()
        self.shared = Shared()


def test_an_attribute_of_the_class_is_the_classs_own_again() -> None:
    model, undo = Holder(), Undo()
    shared = model.shared
    edit_(model, Edit("", "groups", 2, 1), undo)
    edit_(model, Edit("", "shared.heads", 4, 2), undo)
    assert (model.groups, model.shared.heads) == (1, 2)
    assert (Holder.groups, Shared.heads, shared.heads) == (2, 4, 4)
    undo.revert()
    assert model.shared is shared
    assert "groups" not in vars(model)
    assert vars(shared) == {}


def test_attributes_of_native_layers_follow_their_weights() -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.PReLU(16), nn.BatchNorm2d(16), nn.Conv2d(16, 8, 3))
    shrink_(model, Target("channels", 0.5), torch.randn(1, 3, 8, 8))
    assert "num_parameters=8" in repr(model[1])
    assert (model[0].out_channels, model[2].num_features, model[3].in_channels) == (8, 8, 8)
