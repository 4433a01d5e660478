"""Five tasks: queries, targets, loss and metrics."""

from scaling4d.readout.tasks.actions import Actions
from scaling4d.readout.tasks.boxes import Boxes
from scaling4d.readout.tasks.depth import Depth
from scaling4d.readout.tasks.points import Points
from scaling4d.readout.tasks.pose import Pose
from scaling4d.readout.tasks.task import Task

TASKS: dict[str, type[Task]] = {"actions": Actions, "boxes": Boxes, "depth": Depth, "points": Points, "pose": Pose}
