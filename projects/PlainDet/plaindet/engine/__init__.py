from .adapters import DetectorAdapter, Seen, adapter_of, register_adapter
from .build import SHORT_NAMES, build_task, former_base, plain_cfg, training_methods
from .checkpoints import (
    BestCheckpointer,
    ExactResume,
    PlainCheckpointer,
    is_training_only,
    keep_training_only,
)
from .checks import (
    check_datasets,
    check_device,
    check_equal_classes,
    check_num_classes,
    check_teacher_classes,
)
from .evaluation import build_evaluator
from .finite import FiniteLosses
from .idle import IdleGradients
from .lazy import LazyTrainer, detector_lr_factor, load_lazy_config
from .method import METHODS, Method, register_method
from .optimizer import build_optimizer
from .plain_config import write_plain_config
from .preemption import PREEMPTED, Preemption, ending_process_group, supervised_processes
from .task import TrainingTask
from .teacher import CompleteCheckpointer, Teacher, build_teacher, load_teacher
from .trainer import PlainTrainer
