"""What happens inside somebody's training."""

from sess_lightning.callback.callback import SESSCallback

__all__ = ["SESSCallback"]
