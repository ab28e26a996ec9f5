"""What a run writes, and how it goes on from there."""

from .best import BestCheckpointer
from .checkpointer import PlainCheckpointer
from .resume import ExactResume
from .training_only import TrainingOnly, is_training_only, keep_training_only
