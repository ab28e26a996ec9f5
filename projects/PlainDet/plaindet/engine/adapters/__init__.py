"""What the methods have to know of a family of detectors, one module for each family."""

from .base import DetectorAdapter, Seen, adapter_of, register_adapter
from .dense import Assignment, DenseAdapter, Predictions, TowerFeatures
from .detr import DETRAdapter
from .two_stage import RegionPredictions, TwoStageAdapter
