"""What the pretrained cfgs of all families share."""

from typing import Any

CIFAR10_MEAN, CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLASSES = {32: 10, 64: 200, 224: 1000}  # CIFAR-10, Tiny ImageNet, ImageNet-1k


def base_cfg(size: int, **kwargs: Any) -> dict[str, Any]:
    """A timm pretrained cfg for square input of `size` pixels, without weights."""
    small = size <= 64
    return {
        "num_classes": CLASSES[size],
        "input_size": (3, size, size),
        "pool_size": None,
        "crop_pct": 1.0 if small else 0.9,
        "interpolation": "bicubic",
        "mean": CIFAR10_MEAN if small else IMAGENET_MEAN,
        "std": CIFAR10_STD if small else IMAGENET_STD,
        "classifier": "head",
        "license": "apache-2.0",
        "paper_ids": "arXiv:2311.18735",
        "paper_name": "Dimension Mixer",
        **kwargs,
    }
