"""The one loop and what it needs: optimizers, schedules, checkpoints, callbacks, the memory plan."""
