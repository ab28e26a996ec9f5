"""Optimizers by config."""

from __future__ import annotations

import itertools

import torch
from detectron2 import solver
from detectron2.config import CfgNode
from detectron2.modeling import get_vit_lr_decay_rate
from detectron2.solver.build import maybe_add_gradient_clipping
from torch import nn


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """Builds the optimizer as Detectron2 does, with SOLVER.OPTIMIZER, SOLVER.LR_FACTORS,
    SOLVER.VIT_LR_DECAY_RATE and the further CLIP_TYPE "full_model".

    Raises:
        ValueError: an option has an unknown value.
    """
    clip = cfg.SOLVER.CLIP_GRADIENTS
    clip_full_model = clip.ENABLED and clip.CLIP_TYPE == "full_model"
    if clip_full_model:
        cfg = cfg.clone()
        cfg.defrost()
        cfg.SOLVER.CLIP_GRADIENTS.ENABLED = False
    if cfg.SOLVER.OPTIMIZER == "AdamW":
        optimizer = maybe_add_gradient_clipping(cfg, _build_adamw(cfg, model))
    elif cfg.SOLVER.OPTIMIZER == "SGD":
        if cfg.SOLVER.LR_FACTORS:
            raise ValueError("SOLVER.LR_FACTORS needs SOLVER.OPTIMIZER AdamW, found SGD")
        if cfg.SOLVER.VIT_LR_DECAY_RATE != 1:
            raise ValueError("SOLVER.VIT_LR_DECAY_RATE needs SOLVER.OPTIMIZER AdamW, found SGD")
        optimizer = solver.build_optimizer(cfg, model)
    else:
        raise ValueError(f"SOLVER.OPTIMIZER is {cfg.SOLVER.OPTIMIZER!r}, expected 'SGD' or 'AdamW'")
    if clip_full_model:

        def clip_gradients(optimizer, args, kwargs) -> None:
            groups = (group["params"] for group in optimizer.param_groups)
            parameters = itertools.chain.from_iterable(groups)
            nn.utils.clip_grad_norm_(parameters, clip.CLIP_VALUE, clip.NORM_TYPE)

        # A hook of the step, where AMP has scaled the gradients back.
        optimizer.register_step_pre_hook(clip_gradients)
    return optimizer


def _build_adamw(cfg: CfgNode, model: nn.Module) -> torch.optim.AdamW:
    decay_rate = cfg.SOLVER.VIT_LR_DECAY_RATE

    def lr_factor(name: str) -> float:
        factor = next((factor for part, factor in cfg.SOLVER.LR_FACTORS if part in name), 1.0)
        if decay_rate == 1:
            return factor
        # Detectron2 knows the names of a detector, and not those of a task.
        name = name.removeprefix("detector.")
        return factor * get_vit_lr_decay_rate(name, decay_rate, cfg.MODEL.VIT.DEPTH)

    params = solver.get_default_optimizer_params(
        model,
        base_lr=cfg.SOLVER.BASE_LR,
        weight_decay_norm=cfg.SOLVER.WEIGHT_DECAY_NORM,
        weight_decay_bias=cfg.SOLVER.WEIGHT_DECAY_BIAS,
        lr_factor_func=lr_factor,
        overrides={"pos_embed": {"weight_decay": 0.0}} if decay_rate != 1 else {},
    )
    return torch.optim.AdamW(params, cfg.SOLVER.BASE_LR, weight_decay=cfg.SOLVER.WEIGHT_DECAY)
