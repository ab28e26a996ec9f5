from .training_only import TrainingOnlyModules
