"""Training, evaluation and prediction, with run folders and exact resume."""

from .checkpoint import ResumeError, load_checkpoint, save_checkpoint
from .command import run_command
from .config import ConfigError, add_input_arguments, add_model_arguments, parse_with_config
from .evaluate import evaluate
from .export import export_folder
from .models import ModelError
from .predict import predict
from .programs import ExportError, export_programs
from .signals import Interrupted
from .train import train
from .trainer import Trainer
from .validate import validate

__all__ = [
    "ConfigError",
    "ExportError",
    "Interrupted",
    "ModelError",
    "ResumeError",
    "Trainer",
    "add_input_arguments",
    "add_model_arguments",
    "evaluate",
    "export_folder",
    "export_programs",
    "load_checkpoint",
    "parse_with_config",
    "predict",
    "run_command",
    "save_checkpoint",
    "train",
    "validate",
]
