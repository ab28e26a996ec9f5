"""What the benchmarks run: a batch, and training iterations and inference on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace

import torch
from detectron2.config import CfgNode
from detectron2.engine import HookBase, SimpleTrainer
from detectron2.modeling import build_model
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, BottleneckBlock
from detectron2.structures import Boxes, Instances, PolygonMasks
from detectron2.utils.events import EventStorage
from torch import nn
from torch.utils.data import DataLoader

from labelenc import LabelMap
from plaindet.engine import build_optimizer

from benchmark_measure import is_cuda

Step = Callable[[], None]


def make_batch(args) -> list[dict]:
    """Images with `args.boxes` random boxes of `args.present` classes, on the CPU, as a data loader
    hands them over."""
    generator = torch.Generator().manual_seed(0)
    height, width = args.size
    batch = []
    for _ in range(args.images):
        corners = torch.rand(args.boxes, 2, generator=generator) * torch.tensor([width, height]) / 2
        # Sides of 2 % to 60 % of the image, small ones as frequent as large ones on a log scale.
        sides = 0.02 * 30 ** torch.rand(args.boxes, 2, generator=generator)
        sizes = sides * torch.tensor([width, height])
        boxes = torch.cat([corners, corners + sizes], dim=1)
        classes = torch.arange(args.boxes) % args.present * (args.num_classes // args.present)
        instances = Instances((height, width), gt_boxes=Boxes(boxes), gt_classes=classes)
        corners = boxes[:, [0, 1, 2, 1, 2, 3, 0, 3]]
        instances.gt_masks = PolygonMasks([[polygon.numpy()] for polygon in corners])
        size = (3, height, width)
        batch.append(
            {
                "image": torch.randint(0, 256, size, generator=generator, dtype=torch.uint8),
                "instances": instances,
                "label_map": LabelMap.from_boxes(boxes, classes, (height, width)),
            }
        )
    if is_cuda(args.device):  # pinned, as by the data loader of this project's trainers
        (batch,) = DataLoader([batch], batch_size=None, collate_fn=lambda x: x, pin_memory=True)
    return batch


@torch.no_grad()
def build_random_model(cfg: CfgNode) -> nn.Module:
    """A detector with random weights and features about as large as a trained one's. As Detectron2
    draws the weights of a ResNet, its features grow from block to block, with 101 layers beyond
    float16."""
    model = build_model(cfg)
    for module in model.backbone.modules():
        if isinstance(module, BasicStem):
            # As if the pixels were divided by their deviation where they are not.
            module.conv1.norm.weight.mul_(cfg.MODEL.PIXEL_STD[0] / 58)
        elif isinstance(module, BasicBlock):
            module.conv2.norm.weight.mul_(0.2)
        elif isinstance(module, BottleneckBlock):
            module.conv3.norm.weight.mul_(0.2)
    return model


def autocast(args) -> torch.autocast:
    """The mixed precision of `args.amp` on `args.device`, if there is one."""
    precision = getattr(torch, args.amp) if args.amp else None
    return torch.autocast(torch.device(args.device).type, precision, enabled=bool(args.amp))


def training_iteration(
    args, model: nn.Module, cfg: CfgNode, batch: list[dict], hooks: Sequence[HookBase] = ()
) -> Step:
    """Returns a function that runs one iteration on the same batch again: that of Detectron2's
    SimpleTrainer, with `args.amp` that of its AMPTrainer, which does not run on the CPU.

    Args:
        hooks: what they do before the training and before an iteration is done once.
    """
    cfg.SOLVER.BASE_LR = 1e-6  # random labels must not make the numbers explode
    optimizer = build_optimizer(cfg, model.train())
    scaler = torch.amp.GradScaler(torch.device(args.device).type, enabled=bool(args.amp))
    for hook in hooks:
        hook.trainer = SimpleNamespace(iter=0, optimizer=optimizer)
        hook.before_train()
        hook.before_step()

    def step():
        with EventStorage():
            with autocast(args):
                loss_dict = model(batch)
                losses = sum(loss_dict.values())
            optimizer.zero_grad()
            scaler.scale(losses).backward()
            SimpleTrainer.write_metrics(loss_dict, data_time=0.0, cur_iter=0)
            scaler.step(optimizer)
            scaler.update()

    return step


def inference(model: nn.Module, batch: list[dict]) -> Step:
    """Returns a function that runs one inference, as Detectron2 evaluates, without mixed
    precision."""
    model.eval()

    @torch.no_grad()
    def step():
        model(batch)

    return step
