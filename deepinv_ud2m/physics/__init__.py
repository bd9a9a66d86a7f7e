"""Degradations: JPEG, grey images of colour priors, random operators for training, and tasks by name."""

from deepinv_ud2m.physics.channels import ChannelMap
from deepinv_ud2m.physics.generators import (
    BoxMaskGenerator,
    JointGenerator,
    JPEGQualityGenerator,
    UniformBlurGenerator,
)
from deepinv_ud2m.physics.jpeg import JPEG
from deepinv_ud2m.physics.tabulated import TabulatedPhysics, tabulate
from deepinv_ud2m.physics.tasks import TASKS, Task, make_generator, make_physics

__all__ = [
    "JPEG",
    "TASKS",
    "BoxMaskGenerator",
    "ChannelMap",
    "JPEGQualityGenerator",
    "JointGenerator",
    "TabulatedPhysics",
    "Task",
    "UniformBlurGenerator",
    "make_generator",
    "make_physics",
    "tabulate",
]
