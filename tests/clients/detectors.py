"""Detectors of torchvision with DenseNets as backbones, on a torch without torchvision's compiled operators."""

from collections import OrderedDict

import torch
import torch.nn.functional as F
import torchvision.models.detection as detection
from torch import nn
from torchvision.models import densenet
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops import FrozenBatchNorm2d, boxes, poolers

GROWTH, LAYERS, SIZE = 8, (2, 3, 2), 64


def backbone(frozen):
    """The ``features`` of a small DenseNet."""
    features = densenet.DenseNet(GROWTH, LAYERS, 16).features
    return freeze(features) if frozen else features


def freeze(module):
    """``module`` with frozen batch normalisations."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, FrozenBatchNorm2d(child.num_features))
        else:
            freeze(child)
    return module


def pyramid(frozen):
    """A feature pyramid over the outputs of the last two blocks."""
    return BackboneWithFPN(backbone(frozen), {"denseblock2": "0", "norm5": "1"}, [40, 36], 16)


def anchors(levels):
    return AnchorGenerator(tuple((16, 32) for _ in range(levels)), ((1.0,),) * levels)


class Detector(nn.Module):
    """In training, a detector's losses on fixed targets; in inference, its backbone's features."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        if not self.training:
            return self.model.backbone(x)
        box = torch.tensor([[8.0, 8.0, 40.0, 36.0]], dtype=x.dtype)
        return self.model(list(x), [{"boxes": box, "labels": torch.tensor([1])}] * len(x))


def retinanet():
    return Detector(
        detection.RetinaNet(pyramid(True), 3, SIZE, SIZE, anchor_generator=anchors(3))  # two levels and a pooled one
    )


def faster_rcnn():
    """With operators of our own, in place of those that this torchvision does not have."""
    boxes.nms, poolers.roi_align = suppress, pool
    heads = dict(rpn_anchor_generator=anchors(3), box_roi_pool=poolers.MultiScaleRoIAlign(["0", "1"], 3, 2))
    options = dict(min_size=SIZE, max_size=SIZE, box_head=Head(16 * 9), box_predictor=None, num_classes=None)
    options["box_predictor"] = detection.faster_rcnn.FastRCNNPredictor(12, 3)
    return Detector(detection.FasterRCNN(pyramid(True), **options, **heads))


class Head(nn.Sequential):
    def __init__(self, channels):
        super().__init__(OrderedDict(flatten=nn.Flatten(), linear=nn.Linear(channels, 12), relu=nn.ReLU()))


def suppress(candidates, scores, iou_threshold):
    """Indices of boxes that overlap no better one too far, best first."""
    left, kept = scores.argsort(descending=True, stable=True), []
    while len(left):
        kept.append(left[0])
        overlap = boxes.box_iou(candidates[left[:1]], candidates[left])[0]
        left = left[1:][overlap[1:] <= iou_threshold]
    return torch.stack(kept) if kept else left


def pool(features, rois, output_size, spatial_scale, sampling_ratio):
    """Features [K, C, *output_size] sampled in each of ``rois`` [K, 5]: image, left, top, right, bottom."""
    if not len(rois):
        return features.new_zeros(0, features.shape[1], *output_size)
    height, width = features.shape[2:]
    size = torch.tensor([width, height], dtype=rois.dtype) / spatial_scale
    low, high = (2 * rois[:, i : i + 2] / size - 1 for i in (1, 3))
    theta = torch.cat([torch.diag_embed((high - low) / 2), ((high + low) / 2)[..., None]], 2)
    grid = F.affine_grid(theta, [len(rois), features.shape[1], *output_size], align_corners=False)
    return F.grid_sample(features[rois[:, 0].long()], grid, align_corners=False)


def layer_getter(frozen=False):
    return IntermediateLayerGetter(backbone(frozen), {"denseblock1": "low", "transition2": "middle", "norm5": "high"})
