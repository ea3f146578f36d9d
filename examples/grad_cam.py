"""Grad-CAM (Selvaraju et al., https://arxiv.org/abs/1610.02391): which regions of an image DenseNet-121 decides by.

The blocks stay fused. A hook on a block, or on a normalisation behind it, gets the same tensors as in torchvision.

python examples/grad_cam.py IMAGE [--weights IMAGENET1K_V1]
"""

import argparse

import torch
from torch import Tensor, nn

import densenet_fast


def grad_cam(model: nn.Module, layer: nn.Module, images: Tensor, classes: Tensor | None = None) -> Tensor:
    """Heat maps [N, height, width] between 0 and 1 of ``images`` [N, 3, height, width] for ``classes`` [N].

    By default, these are the most probable classes. A heat map is relu(sum over channels of (mean gradient) * (map of
    ``layer``)), scaled to the images' size and a maximum of 1.
    """
    maps: list[Tensor] = []
    handle = layer.register_forward_hook(lambda module, inputs, output: maps.append(output))
    try:
        logits = model(images)
    finally:
        handle.remove()
    classes = logits.argmax(1) if classes is None else classes
    (grad,) = torch.autograd.grad(logits.gather(1, classes[:, None]).sum(), maps[0])
    heat = (grad.mean((2, 3), keepdim=True) * maps[0]).sum(1, keepdim=True).relu()
    heat = nn.functional.interpolate(heat, images.shape[2:], mode="bilinear")[:, 0]
    return (heat / heat.amax((1, 2), keepdim=True).clamp_min(1e-12)).detach()


def main(image: str, weights: str | None, out: str = "grad_cam.png") -> None:
    from PIL import Image
    from torchvision.transforms import v2

    steps = [v2.ToImage(), v2.Resize((224, 224)), v2.ToDtype(torch.float32, scale=True)]
    picture = v2.Compose(steps)(Image.open(image).convert("RGB"))
    normalised = v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])(picture)
    model = densenet_fast.densenet121(weights=weights).eval()
    heat = grad_cam(model, model.features.denseblock4, normalised[None])[0]
    red = torch.stack([heat, torch.zeros_like(heat), 1 - heat])
    v2.functional.to_pil_image(0.5 * picture + 0.5 * red).save(out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image")
    parser.add_argument("--weights", help="torchvision's, by name, or a path")
    arguments = parser.parse_args()
    main(arguments.image, arguments.weights)
