"""The training runs of both methods together."""

from __future__ import annotations

from crosskd import CrossKDTrainer
from labelenc import LabelEncTrainer


class LabelEncCrossKDTrainer(LabelEncTrainer, CrossKDTrainer):
    """Trains step 2 as `LabelEncTrainer` does, with the teacher of `MODEL.CROSSKD.TEACHER`."""
