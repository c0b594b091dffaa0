"""The offline report: one page that replays a training, drawn from its records."""
