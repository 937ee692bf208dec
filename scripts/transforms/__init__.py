"""Into model space and back: geometry, intensity, augmentation, and the files at both ends."""

from __future__ import annotations

from scripts.transforms.augmentation import *
from scripts.transforms.intensity import *
from scripts.transforms.model_space import *
from scripts.transforms.nifti import *
from scripts.transforms.source_grid import *
