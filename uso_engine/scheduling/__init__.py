"""Many requests at once: who takes part in the next step, and the thread that takes it."""
