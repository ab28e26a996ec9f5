from .best import BestCheckpointer
from .checkpointer import PlainCheckpointer
from .checks import (
    check_datasets,
    check_device,
    check_equal_classes,
    check_num_classes,
    check_teacher_classes,
)
from .evaluation import build_evaluator
from .finite import FiniteLosses
from .optimizer import build_optimizer
from .plain_config import write_plain_config
from .preemption import PREEMPTED, Preemption, ending_process_group, supervised_processes
from .resume import ExactResume
from .trainer import PlainTrainer
