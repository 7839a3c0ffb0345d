"""``python -m trainer``."""

from trainer.loop import main

main()
