"""Small networks of the study: the ResNet-18 for 32×32 images with fewer channels; a CPU trains one in minutes."""

from torch_grood.training.networks import ResNet18


def narrow(num_classes: int = 10) -> ResNet18:
    """A quarter of the width: 128 features."""
    return ResNet18(num_classes, width=16)


def middle(num_classes: int = 10) -> ResNet18:
    """Half the width: 256 features."""
    return ResNet18(num_classes, width=32)
