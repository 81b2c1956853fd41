"""Joint mode: a backbone and a detector trained together, from frames."""

from tad.joint.train import train_joint

__all__ = ["train_joint"]
