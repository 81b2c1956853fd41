"""What every training shares, of detectors and of backbones: processes, optimizers, random state."""
