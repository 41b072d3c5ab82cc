"""The two networks of the founding papers, at their published sizes.

Song Han, Jeff Pool, John Tran, William J. Dally, Learning both Weights and Connections for Efficient Neural Networks,
2015, prune both by a factor of 12 on MNIST.
"""

from __future__ import annotations

from collections import OrderedDict

from torch import nn


def lenet_300_100() -> nn.Sequential:
    """Fully connected 784-300-100-10 with ReLU: 266,610 parameters, 266,200 of them weights.

    Yann LeCun, Leon Bottou, Yoshua Bengio, Patrick Haffner, Gradient-Based Learning Applied to Document Recognition,
    1998.

    Returns:
        A model from images ``[N, 1, 28, 28]`` to logits ``[N, 10]``.
    """
    return nn.Sequential(
        OrderedDict(
            flatten=nn.Flatten(),
            fc1=nn.Linear(784, 300),
            relu1=nn.ReLU(),
            fc2=nn.Linear(300, 100),
            relu2=nn.ReLU(),
            fc3=nn.Linear(100, 10),
        )
    )


def lenet_5_caffe() -> nn.Sequential:
    """LeNet-5 as Caffe ships it (20 and 50 filters, 500 hidden units): 431,080 parameters, 430,500 of them weights.

    This is the network that pruning papers call LeNet-5; LeCun's own, of 1998, has about 60,000 parameters. As in
    Caffe's definition, convolutions are unpadded 5x5, max-pooled 2x2, and only the hidden layer has a ReLU.

    Returns:
        A model from images ``[N, 1, 28, 28]`` to logits ``[N, 10]``.
    """
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(1, 20, 5),
            pool1=nn.MaxPool2d(2),
            conv2=nn.Conv2d(20, 50, 5),
            pool2=nn.MaxPool2d(2),
            flatten=nn.Flatten(),
            fc1=nn.Linear(800, 500),
            relu=nn.ReLU(),
            fc2=nn.Linear(500, 10),
        )
    )


NETS = {"lenet_300_100": lenet_300_100, "lenet_5_caffe": lenet_5_caffe}
