"""What happens inside a user's training."""

from sess_lightning.callback.callback import SESSCallback

__all__ = ["SESSCallback"]
