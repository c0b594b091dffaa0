"""Watch where a small CNN looks while it learns to read: ``python examples/demo.py``.

Trains on the digits of ``digits.py`` for about a minute, plus the scoring. After every epoch, SESS maps of
some validation images are drawn and compared with plain Grad-CAM, a random map and a blob at the centre.
Everything goes to W&B (offline, unless ``--online``) and to local files below ``--out``.
"""

from __future__ import annotations

import argparse

from lightning.pytorch import seed_everything

from _run import EpochTable, add_arguments, make_trainer, report
from digits import DigitsDataModule, SmallCNN


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser, epochs=8, out="runs/demo")
    args = parser.parse_args()

    seed_everything(args.seed)
    table = EpochTable()
    callbacks = [table]
    if not args.no_sess:
        from sess_lightning import SESSCallback

        callbacks.insert(0, SESSCallback(num_samples=args.num_samples))
    trainer = make_trainer(args, callbacks)
    trainer.fit(SmallCNN(), datamodule=DigitsDataModule())
    report(trainer, table)


if __name__ == "__main__":
    main()
