"""Image folders checked, then timm's data sets and transforms, read in an exactly repeatable order."""

from .check import check_class_folders, find_bad_images, read_problem
from .errors import DataError, UserError
from .image import ImageSource, create_image_loader, find_split, open_dataset, open_image_folder, open_train_val
from .sampling import PositionedBatchSampler, SeededDataset, sample_rng, to_mode

__all__ = [
    "DataError",
    "ImageSource",
    "PositionedBatchSampler",
    "SeededDataset",
    "UserError",
    "check_class_folders",
    "create_image_loader",
    "find_bad_images",
    "find_split",
    "open_dataset",
    "open_image_folder",
    "open_train_val",
    "read_problem",
    "sample_rng",
    "to_mode",
]
